"""almost-jax score: what a model thinks of given texts, token by token; a file in, a file out, resumable."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from almost_jax.commands.places import DtypeOption, MeshOption, check_dtype, on_disk, parse_mesh
from almost_jax.config import MeshConfig
from almost_jax.core.partitioning import exact_products, make_mesh, whole_rows
from almost_jax.errors import InputError
from almost_jax.io.models import Model, load_model
from almost_jax.io.progress import ShowProgress, stderr_progress
from almost_jax.io.records import Record, RecordWriter, check_writable, numbered_records
from almost_jax.io.transfer import locate
from almost_jax.sampling.scoring import completion_logprobs, score_sequences
from almost_jax.stages.execution import head_chunk

# Rows are padded to a multiple of it, so that a few programs serve all lengths.
_MULTIPLE = 64
# Lines that are sorted by length together, in batches.
_BATCHES_AT_ONCE = 16
# Two runs of one program on the same numbers may be batched differently.
_TOLERANCE = 1e-3


def score_command(
    model: Annotated[str, typer.Option(help="A model of ours, a Hugging Face folder or hub name, or a GGUF file.")],
    input: Annotated[Path, typer.Option(help='JSON lines with "prompt" and "completion".', callback=on_disk)],
    out: Annotated[
        Path, typer.Option(help="JSON lines: the same with log-probs, and a reward model's score.", callback=on_disk)
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 8,
    dtype: DtypeOption = "float32",
    end: Annotated[
        bool | None,
        typer.Option(
            "--end/--no-end",
            help="Read a reward model's score at an end of text behind the text, or at the text's last token; as the "
            "model says when not given: ours at the end of text.",
        ),
    ] = None,
    mesh: MeshOption = None,
) -> None:
    """Score completions: the log-prob of each of their tokens, their sum, and a reward model's normalised score."""
    if not input.is_file():
        raise InputError(f"{input}: no such file; expected JSON lines with prompt and completion")
    check_dtype(dtype)
    if input.resolve() == out.resolve():
        raise InputError(f"{out}: is the input; expected another file")
    check_writable(out)
    place = make_mesh(MeshConfig()) if mesh is None else parse_mesh(mesh)
    loaded = load_model(locate(model), place, dtype)
    shape = dataclasses.replace(loaded.config, vocab_chunk=head_chunk(MeshConfig()))
    loaded = dataclasses.replace(loaded, config=shape)
    size = whole_rows(place, batch_size)
    # Accelerators multiply float32 in fewer bits unless they are told not to.
    with jax.set_mesh(place), exact_products(dtype):
        score_file(loaded, input, out, size, loaded.score_at_end if end is None else end, stderr_progress)


def score_file(
    model: Model, source: Path, out: Path, batch_size: int, end: bool, show_progress: ShowProgress
) -> None:
    """Score a file of lines {"prompt", "completion"}; what an interrupted call has written is kept and goes on.

    The output has the lines of the input in their order, each with `line` (its number), `tokens` (the completion's
    ids), `token_logprobs` (after the prompt, over the whole vocabulary, at temperature 1), `logprob` (their sum) and,
    of a reward model, `reward` (normalised).

    Args:
        model: whose scores.
        source: of the lines; read as they are needed.
        out: appears when all are scored.
        batch_size: texts per forward pass.
        end: whether the end of text stands behind a text where a reward model's score is read.
        show_progress: shows how many of the lines are scored.

    Raises:
        InputError: a line is malformed or too long for the model, or what is written already was scored by another
            model or from another file.
    """
    total = sum(1 for _ in _checked(source))
    with (
        RecordWriter(out, key=lambda record: str(record["line"])) as writer,
        show_progress("scored", total, min(len(writer.done), total)) as progress,
    ):
        kept, place = list(writer.records), 0
        checked = not kept
        for chunk in _chunks(source, batch_size * _BATCHES_AT_ONCE):
            done = kept[place : place + len(chunk)]
            place += len(chunk)
            for line, record in zip(chunk, done, strict=False):
                if any(record.get(key) != line[key] for key in ("line", "prompt", "completion")):
                    raise InputError(f"{out}.partial, line {line['line']}: from another input; delete it to start over")
            if done and not checked:
                checked = True
                again = next(_scored(model, chunk[: len(done)][-1:], source, batch_size, end))
                if not _agree(again, done[-1]):
                    raise InputError(f"{out}.partial: was scored by another model; delete it to start over")
            for record in _scored(model, chunk[len(done) :], source, batch_size, end):
                writer.write(record)
                progress.advance()
        if len(kept) > place:
            raise InputError(f"{out}.partial: has more lines than {source}; delete it to start over")
        writer.finish()


def _checked(source: Path) -> Iterator[Record]:
    """The lines of the file with their numbers, blank ones left out."""
    for number, record in numbered_records(source):
        for key in ("prompt", "completion"):
            if not isinstance(record.get(key), str):
                raise InputError(f"{source}, line {number}: {key} is {record.get(key)!r}; expected a text")
        yield {**record, "line": number}


def _chunks(source: Path, size: int) -> Iterator[list[Record]]:
    """The lines of the file, `size` at a time."""
    chunk: list[Record] = []
    for record in _checked(source):
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _scored(model: Model, lines: list[Record], source: Path, batch_size: int, end: bool) -> Iterator[Record]:
    if not lines:
        return
    tokenizer = model.tokenizer
    prompts = [tokenizer.encode_prompt(line["prompt"]) for line in lines]
    completions = [tokenizer.encode_behind(line["completion"], plain=True) for line in lines]
    last = [tokenizer.eos_id] if end and model.kind == "reward" else []
    for line, prompt, completion in zip(lines, prompts, completions, strict=True):
        where, length = f"{source}, line {line['line']}", len(prompt) + len(completion) + len(last)
        if not prompt:
            raise InputError(f"{where}: prompt is empty; the completion's first token would have no log-prob")
        if length > model.config.max_position_embeddings:
            raise InputError(f"{where}: {length} tokens; the model reads {model.config.max_position_embeddings}")
    batches: dict[str, Any] = {"batch_size": batch_size, "multiple": _MULTIPLE}
    found = completion_logprobs(model.params, model.config, prompts, completions, temperature=1.0, **batches)
    rewards = np.zeros(0)
    if model.kind == "reward":
        texts = [[*prompt, *completion, *last] for prompt, completion in zip(prompts, completions, strict=True)]
        raw = score_sequences(model.params, model.config, texts, **batches)
        rewards = (raw.astype(np.float64) - model.reward_mean) / model.reward_std
    for place, (line, completion) in enumerate(zip(lines, completions, strict=True)):
        record = {
            **line,
            "tokens": completion,
            "token_logprobs": [float(one) for one in found[place]],
            "logprob": float(np.sum(found[place], dtype=np.float64)),
        }
        yield {**record, "reward": float(rewards[place])} if model.kind == "reward" else record


def _agree(again: Record, before: Record) -> bool:
    """Whether two scorings of a line come from the same model."""
    numbers = [
        np.asarray([*record.get("token_logprobs", []), record.get("reward", 0.0)], np.float64)
        for record in (again, before)
    ]
    same = again["tokens"] == before.get("tokens") and ("reward" in again) == ("reward" in before)
    return same and bool(np.allclose(numbers[0], numbers[1], rtol=_TOLERANCE, atol=_TOLERANCE))
