"""almost-jax generate: many prompts continued by one model; a file in, a file out, resumable."""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer

from almost_jax.commands.chat import ends, sampling_rules
from almost_jax.commands.places import (
    DtypeOption,
    MeshOption,
    SeedOption,
    check_dtype,
    keep_compiled_programs,
    on_disk,
    parse_mesh,
)
from almost_jax.config import MeshConfig, SamplingConfig
from almost_jax.core.partitioning import exact_products, make_mesh
from almost_jax.errors import InputError
from almost_jax.io.models import Model, load_model, model_digest
from almost_jax.io.progress import stderr_progress
from almost_jax.io.records import (
    Record,
    RecordWriter,
    check_writable,
    numbered_records,
    partial_path,
    write_records,
)
from almost_jax.io.transfer import locate
from almost_jax.sampling.engine import Engine
from almost_jax.sampling.requests import Completion, Request, Settings, check_requests
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.stats import Stats
from almost_jax.sampling.stops import StopStrings

_DEFAULTS = SamplingConfig()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line of the input: the file and its number, its id, its text and its own limit, if it has one."""

    where: str
    id: str
    text: str
    max_new_tokens: int | None


def generate_command(
    model: Annotated[str, typer.Option(help="A model of ours, a Hugging Face folder or hub name, or a GGUF file.")],
    prompts: Annotated[
        Path,
        typer.Option(help='JSON lines with "prompt", and if you like "id" and "max_new_tokens".', callback=on_disk),
    ],
    out: Annotated[
        Path, typer.Option(help="JSON lines: one for each sample, in the order of the prompts.", callback=on_disk)
    ],
    prefix_file: Annotated[
        Path | None,
        typer.Option(help="A text before every prompt, such as a few-shot prompt; read once.", callback=on_disk),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Samples for each prompt.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Where a line has no limit of its own; "
            f"{_DEFAULTS.max_new_tokens}, or what the model has room for, when not given.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = _DEFAULTS.temperature,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = _DEFAULTS.top_p,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = _DEFAULTS.top_k,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a sample (a line feed is $'\\n'); as often as you like.")
    ] = None,
    seed: SeedOption = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that run at once.")] = _DEFAULTS.batch_size,
    steps_per_wake: Annotated[
        int, typer.Option(min=1, help="Tokens between two looks for what has ended.")
    ] = _DEFAULTS.steps_per_wake,
    refill: Annotated[
        bool, typer.Option("--refill/--no-refill", help="Give a free place to the next prompt at once.")
    ] = _DEFAULTS.refill,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of prompts that are read together.")
    ] = _DEFAULTS.prefill_tokens,
    dtype: DtypeOption = "float32",
    mesh: MeshOption = None,
) -> None:
    """Continue prompts; a sample depends on the seed, its prompt's id and its number, on nothing else that runs.

    The last line on standard error is a JSON object with the rates.
    """
    check_dtype(dtype)
    for given in (prompts, *(() if prefix_file is None else (prefix_file,))):
        for written in (out, partial_path(out)):
            if given.resolve() == written.resolve():
                what = "is" if written is out else f"is written by way of {written.name}, which is"
                raise InputError(f"{out}: {what} the input; expected another file")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: must be above 0 and at most 1")
    if any(not text for text in stop or []):
        raise InputError("--stop: is empty, which every text holds; give at least one character")
    check_writable(out)
    asked = read_prompts(prompts)
    prefix = "" if prefix_file is None else _read_text(prefix_file)
    keep_compiled_programs()
    place = make_mesh(MeshConfig()) if mesh is None else parse_mesh(mesh)
    located = locate(model)
    if Path(located).resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out}: is of the model that is read; expected another file")
    loaded = load_model(located, place, dtype)
    if loaded.kind == "reward":
        raise InputError(f"{model}: is a reward model; expected one that writes")
    values = {"temperature": temperature, "top-p": top_p, "top-k": top_k}
    values["max-new-tokens"] = _DEFAULTS.max_new_tokens if max_new_tokens is None else max_new_tokens
    sampling = Sampling(
        rules=sampling_rules(values, () if ignore_eos else ends(loaded, located)),
        as_room_allows=max_new_tokens is None,
        settings=Settings(batch_size, steps_per_wake, refill, prefill_tokens),
        stops=tuple(stop or []),
        prefix=prefix,
        seed=seed,
        n=n,
    )
    with jax.set_mesh(place), exact_products(dtype):
        stats = generate_file(loaded, asked, out, sampling)
    sys.stderr.write(json.dumps(stats.report()) + "\n")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How every prompt is continued: `n` samples of each, behind `prefix`, ended by `stops` too.

    A prompt without a limit of its own has the rules', or, with `as_room_allows`, no more than is left of the model's
    positions.
    """

    rules: SamplingRules
    as_room_allows: bool
    settings: Settings
    stops: tuple[str, ...]
    prefix: str
    seed: int
    n: int

    def digest(self, model: str, prompt: Sequence[int], limit: int) -> str:
        """What must be the same for a sample to be kept; how the engine runs changes nothing.

        Args:
            model: the model's own digest.
            prompt: its tokens.
            limit: of new tokens.
        """
        rules = {**dataclasses.asdict(self.rules), "max_new_tokens": limit}
        said = [rules, self.stops, self.prefix, self.seed, model, list(prompt)]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, blank lines left out; a line without an id has its number as one.

    Raises:
        InputError: the file can't be read, or a line is malformed or has the id of another one.
    """
    found: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, record in numbered_records(path):
        where = f"{path}, line {number}"
        text, name, limit = record.get("prompt"), record.get("id", number), record.get("max_new_tokens")
        if not isinstance(text, str):
            raise InputError(f"{where}: prompt is {text!r}; expected a text")
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise InputError(f"{where}: id is {name!r}; expected a text or a number")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise InputError(f"{where}: max_new_tokens is {limit!r}; expected a number of tokens, 1 or more")
        if str(name) in seen:
            raise InputError(f"{where}: id {name!r} stands in line {seen[str(name)]} too; samples depend on it")
        seen[str(name)] = number
        found.append(Prompt(where, str(name), text, limit))
    return found


def generate_file(model: Model, prompts: Sequence[Prompt], out: Path, sampling: Sampling) -> Stats:
    """Sample a file; what an interrupted call has written is kept and goes on.

    Samples are written as they finish, and sorted when all are there. Each line has `id`, `sample` (0 to n - 1), `text`
    (before the stop string), `tokens` and `logprobs` (as drawn, stop token included), `finish` ("stop_token",
    "stop_string" or "length") and `run`, a digest of the model, the settings and the prompt.

    Args:
        model: who writes.
        prompts: what is continued.
        out: appears when all is sampled.
        sampling: how.

    Raises:
        InputError: a prompt can't be continued, or what is written already has other prompts or settings.
    """
    tokenizer = model.tokenizer
    encode: Callable[[str], list[int]]
    if sampling.prefix:
        prefix, encode = tokenizer.encode_prompt(sampling.prefix), tokenizer.encode_behind
    else:
        prefix, encode = [], tokenizer.encode_prompt
    requests: list[Request] = []
    digests: dict[str, str] = {}
    digest = model_digest(model)
    limits: list[int] = []
    most = max([sampling.rules.max_new_tokens, *(prompt.max_new_tokens or 1 for prompt in prompts)])
    for prompt in prompts:
        tokens = tuple(encode(prompt.text))
        limit = _limit(prompt, model.config.max_position_embeddings - len(prefix) - len(tokens), sampling)
        own = [Request(f"{prompt.id}/{sample}", tokens, limit) for sample in range(sampling.n)]
        try:
            check_requests(own[:1], model.config, most, len(prefix), ())
        except InputError as error:
            raise InputError(f"{prompt.where}: {error}") from error
        requests += own
        limits.append(limit)
        digests.update(dict.fromkeys([one.id for one in own], sampling.digest(digest, tokens, limit)))
    added = tokenizer.backend.added_tokens_decoder.values()
    for token in {*tokenizer.backend.all_special_tokens, *(str(one) for one in added if one.special)}:
        if any(token in stop for stop in sampling.stops):
            raise InputError(
                f"--stop: holds the special token {token!r}, and texts, in which stops are looked for, are without "
                "those; the end of text ends a sample anyway"
            )
    rules = dataclasses.replace(sampling.rules, max_new_tokens=max(limits, default=1))
    # Of all samples, not of those that are left, so that a call that goes on has as many.
    slots = max(min(sampling.settings.slots, len(requests)), 1)
    engine = Engine(
        model.params, model.config, rules, dataclasses.replace(sampling.settings, slots=slots),
        seed=sampling.seed, prefix_tokens=prefix,
        stops=StopStrings(sampling.stops, tokenizer.decode_behind) if sampling.stops else None,
    )  # fmt: skip
    with RecordWriter(out, key=lambda record: f"{record['id']}/{record['sample']}") as writer:
        _check_resumed(writer, digests)
        with stderr_progress("samples", len(requests), len(writer.done)) as progress:
            for done in engine.run([one for one in requests if one.id not in writer.done]):
                writer.write(_record(model, done, sampling.stops, digests[done.id]))
                progress.advance(tokens_per_second=engine.stats.rate())
        order = {one.id: place for place, one in enumerate(requests)}
        records = sorted(writer.records, key=lambda record: order[writer.key(record)])
        write_records(partial_path(out), records)
        writer.finish()
    return engine.stats


def _record(model: Model, done: Completion, stops: Sequence[str], digest: str) -> Record:
    name, _, sample = done.id.rpartition("/")
    if not all(map(math.isfinite, done.logprobs)):
        raise InputError(f"{model.name}: log-probs for prompt {name!r} aren't finite; look at the weights, or --dtype")
    text = model.tokenizer.decode_behind(done.content)
    if done.finish == "stop_string":
        text = text[: min(place for place in (text.find(stop) for stop in stops) if place >= 0)]
    return {
        "id": name,
        "sample": int(sample),
        "text": text,
        "tokens": list(done.tokens),
        "logprobs": list(done.logprobs),
        "finish": done.finish,
        "run": digest,
    }


def _limit(prompt: Prompt, room: int, sampling: Sampling) -> int:
    """How many tokens a prompt's samples may have, of which the model has `room`."""
    if prompt.max_new_tokens is not None:
        return prompt.max_new_tokens
    usual = sampling.rules.max_new_tokens
    return room if sampling.as_room_allows and 1 <= room < usual else usual


def _check_resumed(writer: RecordWriter, digests: Mapping[str, str]) -> None:
    """Refuse to go on with a file of other prompts or settings."""
    partial = partial_path(writer.path)
    strange = sorted(writer.done - set(digests))
    if strange:
        raise InputError(
            f"{partial}: holds {strange[0]!r} (prompt/sample), which isn't asked for: other prompts, or a lower -n; "
            "delete it to start over"
        )
    for number, record in enumerate(writer.written(), start=1):
        if record.get("run") != digests[writer.key(record)]:
            raise InputError(
                f"{partial}, line {number}: was sampled from another prompt or with other settings; "
                "delete the file to start over"
            )


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}); expected a text in UTF-8") from error
    if not text:
        raise InputError(f"{path}: is empty; expected a text that stands before every prompt")
    return text
