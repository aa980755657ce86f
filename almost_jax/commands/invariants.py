"""Statements about a model that must hold on any machine, as checks of one model and tokenizer.

Numbers are those of the test suite's statements: 3 cached decoding, 5 devices, 7 the sampler's log-probs, 8 stop
strings and padding, 16 policy against reference. Each check comes back with what was measured, and where it fails, with
what to do about it.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from almost_jax.config import MeshConfig
from almost_jax.core.llama import (
    LlamaConfig,
    Params,
    empty_cache,
    hidden_states,
    hidden_states_cached,
    logical_axes,
    logits,
    prefill_prefix,
)
from almost_jax.core.losses import cross_entropy_sums
from almost_jax.core.partitioning import make_mesh, shardings
from almost_jax.core.rl import kl_estimates
from almost_jax.core.train import accumulate_gradients
from almost_jax.io.models import Model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.engine import Completion, Request, Settings, generate
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.stages.dialogues import training_tokens
from almost_jax.stages.prompting import cut, spanning_stops, stop_strings
from almost_jax.stages.sft import example_batch
from almost_jax.stages.templates import Turn

Outcome: TypeAlias = Literal["pass", "FAIL", "skipped"]

PROMPTS = ("Question: what is the colour of the sky?", "two and three", "Name a river.", "Why do birds sing, and")
DIALOGUE: list[Turn] = [
    {"role": "human", "text": "What is the capital of France?"},
    {"role": "assistant", "text": "It is Paris."},
    {"role": "human", "text": "And of Spain?"},
    {"role": "assistant", "text": "Madrid."},
]
TEXTS = (
    "A plain sentence, with two clauses.",
    "Two lines:\n  the second is indented; 12 + 30 = 42.",
    "naïve café — Ωμέγα, 漢字 and 🙂",
    "Human: hello\n\nAssistant: hi",
)
# What ends a vanilla model's turn.
STOPS = stop_strings("")
NEW_TOKENS = 12
TEMPERATURE = 0.7
# float32 on the same machine, where programs differ in how sums are ordered. Relative to the largest logit where logits
# are compared.
TOLERANCE = 1e-4
# Gradients and samples of so many devices are compared with one's.
DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Check:
    """What became of one statement: its number and name, the outcome, what was seen, and how to mend it."""

    name: str
    outcome: Outcome
    seen: str
    fix: str = ""


def check_weights(model: Model) -> Check:
    """Every weight is a number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        bad = int(leaf.size - jnp.isfinite(leaf).sum())
        if bad:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            return Check(
                "weights are finite",
                "FAIL",
                f"{bad:,} of {leaf.size:,} numbers of {where} are NaN or infinite",
                "the checkpoint is broken: import it again from its source, or go back to the checkpoint before it",
            )
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return Check("weights are finite", "pass", f"{count:,} numbers")


def check_tokenizer(tokenizer: Tokenizer) -> Check:
    """A text comes back from its tokens, and the text of more tokens begins with the text of fewer.

    What a tokenizer has no token for, it need not spell; where that is every text here, one of its own words is taken.
    """
    name = "tokens spell their text"
    unknown = {tokenizer.unk_id, tokenizer.pad_id} - {None, tokenizer.eos_id}
    spelled = [text for text in TEXTS if not unknown & {*tokenizer.encode(text)}]
    spread = range(0, tokenizer.vocab_size, max(tokenizer.vocab_size // NEW_TOKENS, 1))
    places = 0
    for text in spelled or [tokenizer.decode([token for token in spread if token != tokenizer.eos_id])]:
        tokens = tokenizer.encode(text)
        again = tokenizer.decode(tokens)
        if _letters(again) != _letters(text):
            return Check(
                name,
                "FAIL",
                f"{text!r} comes back as {again!r}",
                "letters are lost: see that the tokenizer has tokens for all of them, byte by byte if need be, and "
                "that no `normalizer` in tokenizer.json takes them away",
            )
        if again != text:
            # Some tokenizers change spaces, on purpose; what matters here is that text only ever grows.
            tokens = tokenizer.encode(again)
        whole = tokenizer.decode(tokens)
        places += len(tokens)
        for count in range(1, len(tokens)):
            part = tokenizer.decode(tokens[:count])
            # A letter may be cut in the middle of its bytes, which decodes to the replacement character.
            if not whole.startswith(part.rstrip("\ufffd").strip()):
                return Check(
                    name,
                    "FAIL",
                    f"the first {count} tokens of {whole!r} decode to {part!r}, which is not how the text begins",
                    "stop strings would be cut in the wrong place: give the tokenizer a decoder that joins tokens "
                    "from left to right (`decoder` in tokenizer.json), and no clean-up of spaces",
                )
    texts = f"{len(spelled)} of {len(TEXTS)} texts" if spelled else "words of its own, since it knows none of the texts"
    return Check(name, "pass", f"{texts}, after each of {places} tokens")


def _letters(text: str) -> str:
    """A text without its spaces, and without what normalisation and capitals change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_stops(tokenizer: Tokenizer) -> Check:
    """8. A stop string that spans tokens is cut exactly; ends of text stay targets when they are the padding too."""
    name = "8 stop strings, and padding by the end of text"
    for stop in STOPS:
        label = stop.strip()
        tokens = tokenizer.encode(f"Paris it is.\n\n{label} and more")
        said = tokenizer.decode(tokenizer.encode("Paris it is."))
        found, stopped = cut(tokenizer.decode(tokens), STOPS)
        # A tokenizer without line breaks can't show where a line begins; its labels must be tokens of their own.
        broken = "\n" in tokenizer.decode(tokens)
        if broken and stopped and found == said:
            stopped, found = _stopped_by_tokens(tokenizer, tokens, stop)
        if broken and (not stopped or found != said):
            return Check(
                name,
                "FAIL",
                f"{label!r} at the beginning of a line was {'cut to ' + repr(found) if stopped else 'not found'}",
                "see that the tokenizer decodes line breaks as it encodes them (`decoder`, `normalizer` in "
                "tokenizer.json)",
            )
        if not broken and tokenizer.single_token(label) is None:
            return Check(
                name,
                "FAIL",
                f"the tokenizer drops line breaks, and {label!r} is {len(tokenizer.encode(label))} tokens",
                "dialogues can't be told apart: use a tokenizer that keeps line breaks, or add the labels as tokens",
            )
    example = training_tokens(tokenizer, DIALOGUE)
    padded = example_batch([example], len(example[0]) + 5, tokenizer.eos_id)
    ends = int((padded["targets"] & (padded["tokens"] == tokenizer.eos_id)).sum())
    if ends != 2:
        return Check(
            name,
            "FAIL",
            f"{ends} of 2 ends of turns are targets when the padding is the end of text",
            "set another eos_token in tokenizer_config.json: this one also stands inside of what is said",
        )
    same = "is" if tokenizer.pad_id == tokenizer.eos_id else "is not"
    return Check(name, "pass", f"{len(STOPS)} stop strings; the padding {same} the end of text")


def _stopped_by_tokens(tokenizer: Tokenizer, tokens: Sequence[int], stop: str) -> tuple[bool, str]:
    """Whether the sampler stops at the first token that completes the string, and the text that it keeps."""
    stops = spanning_stops(tokenizer, [stop])
    if stops is None:
        return True, cut(tokenizer.decode(tokens), [stop])[0]
    first = stops.first(tokens, 0)
    if first is None or cut(tokenizer.decode(tokens[: first - 1]), [stop])[1]:
        return False, ""
    head = tokenizer.decode(tokens[: stops.before(tokens)])
    kept, stopped = cut(tokenizer.decode(tokens[:first]), [stop])
    return stopped, kept if head.startswith(kept) else head


def check_cache(model: Model) -> Check:
    """3. Cached decoding equals the full forward pass at every position, also behind a shared prefix."""
    name = "3 cached decoding is the full forward pass"
    rows = _rows(model)
    width = min(len(row) for row in rows)
    tokens = jnp.asarray([row[:width] for row in rows], jnp.int32)
    cut_at = max(width // 3, 1)
    worst = 0.0
    for prefix in (0, cut_at):
        # With a prefix, the rows share their beginning: that of the first one.
        shared = jnp.broadcast_to(tokens[:1, :prefix], (len(rows), prefix))
        whole = jnp.concatenate([shared, tokens[:, prefix:]], axis=1)
        full = np.asarray(_logits(model.params, model.config, whole)[:, prefix:])
        found = np.asarray(_cached_logits(model.params, model.config, whole, prefix))
        worst = _worst(worst, np.abs(full - found).max() / max(float(np.abs(full).max()), 1.0))
    return _within(name, worst, "largest difference of logits", _SLOPPY)


def check_logprobs(model: Model) -> Check:
    """7. The log-probs that the sampler reports are those of scoring its tokens anew, at the same temperature."""
    completions = _sampled(model, TEMPERATURE)
    worst = _worst(*(np.max(np.abs(ours - theirs)) for ours, theirs in _rescored(model, completions, TEMPERATURE)))
    count = sum(len(completion.tokens) for completion in completions)
    return _within("7 the sampler's log-probs are the trainer's", worst, f"{count} tokens, largest difference", _SLOPPY)


def check_ratio(model: Model) -> Check:
    """16. A policy that is its own reference has KL 0 and ratios of 1, at any temperature and in any batch."""
    worst = 0.0
    for temperature in (0.7, 1.3):
        completions = _sampled(model, temperature)
        together = [theirs for _, theirs in _rescored(model, completions, temperature)]
        alone = [
            theirs for completion, row in zip(completions, _rows(model), strict=True)
            for _, theirs in _rescored(model, [completion], temperature, [row])
        ]  # fmt: skip
        for left, right in zip(together, alone, strict=True):
            kl = np.asarray(kl_estimates(jnp.asarray(left), jnp.asarray(right), "k1"))
            worst = _worst(worst, np.max(np.abs(kl)), np.max(np.abs(np.exp(left - right) - 1.0)))
    return _within("16 policy = reference: KL 0, ratio 1", worst, "largest KL or |ratio - 1|", _SLOPPY)


def check_devices(model: Model, devices: Sequence[jax.Device]) -> Check:
    """5. Several devices give the loss, the gradients and the samples of one.

    Args:
        model: on any devices.
        devices: those to compare with the first of them, at least two.
    """
    name = f"5 {len(devices)} devices are one device"
    config = model.config
    host: Params = jax.tree.map(np.asarray, model.params)
    expected: Any = None
    sampled: list[tuple[int, ...]] = []
    meshes = [make_mesh(MeshConfig(data=1), devices[:1]), *_meshes(config, devices)]
    worst = 0.0
    for mesh in meshes:
        placed = jax.device_put(host, shardings(logical_axes(config), mesh))
        with jax.set_mesh(mesh):
            figures = _gradients(placed, config, _batch(model, len(devices)))
            own = dataclasses.replace(model, params=placed)
            drawn = [completion.tokens for completion in _sampled(own, TEMPERATURE, copies=len(devices))]
        grads, loss = jax.tree.map(np.asarray, figures)
        if expected is None:
            expected, sampled = (grads, loss), drawn
            continue
        scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[0])) or 1.0
        for left, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[0]), strict=True):
            worst = _worst(worst, np.abs(left - right).max() / scale)
        worst = _worst(worst, abs(float(loss - expected[1])) / max(abs(float(expected[1])), 1.0))
        if drawn != sampled:
            wrong = sum(ours != theirs for ours, theirs in zip(drawn, sampled, strict=True))
            shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
            return Check(name, "FAIL", f"{wrong} of {len(drawn)} samples differ on the mesh {shape}", _SLOPPY)
    tried = ", ".join("x".join(str(size) for size in mesh.shape.values()) for mesh in meshes[1:])
    return _within(name, worst, f"meshes {tried}: samples equal; largest difference of loss and gradients", _SLOPPY)


_SLOPPY = (
    "numbers of this size come from matrix products in few bits: compute in float32 and leave "
    "jax_default_matmul_precision alone or at 'highest'; if it is float32 already, please report it with this line"
)


def _worst(*differences: Any) -> float:
    """The largest of some numbers; NaN where one of them is NaN, which `max` may pass over."""
    return float(np.max([float(found) for found in differences]))


def _within(name: str, worst: float, what: str, fix: str) -> Check:
    seen = f"{what} {worst:.1e} (at most {TOLERANCE:.0e})"
    return Check(name, "pass", seen) if worst <= TOLERANCE else Check(name, "FAIL", seen, fix)


def _rows(model: Model) -> list[list[int]]:
    """Prompts of several lengths, cut to what the model can read."""
    tokenizer, room = model.tokenizer, model.config.max_position_embeddings - NEW_TOKENS
    begin = tokenizer.begin
    return [[*begin, *tokenizer.encode(text)][:room] for text in PROMPTS]


def _rules(model: Model, temperature: float) -> SamplingRules:
    return SamplingRules(
        temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=NEW_TOKENS, stop_tokens=(model.tokenizer.eos_id,)
    )


def _sampled(model: Model, temperature: float, copies: int = 1) -> list[Completion]:
    rows = _rows(model) * copies
    requests = [Request(str(place), tuple(row)) for place, row in enumerate(rows)]
    return list(
        generate(
            model.params,
            model.config,
            requests,
            _rules(model, temperature),
            Settings(slots=len(requests), steps_per_wake=NEW_TOKENS, refill=True, prefill_tokens=1024),
            seed=0,
            prefix_tokens=(),
        )
    )


def _rescored(
    model: Model, completions: Sequence[Completion], temperature: float, prompts: Sequence[Sequence[int]] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the sampler said of its tokens, and what scoring them says."""
    found = completion_logprobs(
        model.params,
        model.config,
        _rows(model) if prompts is None else prompts,
        [completion.tokens for completion in completions],
        temperature=temperature,
        batch_size=len(completions),
        multiple=16,
    )
    said = [np.asarray(completion.logprobs, np.float32) for completion in completions]
    return list(zip(said, found, strict=True))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: LlamaConfig, tokens: Array) -> Array:
    return logits(params, config, hidden_states(params, config, tokens))


@functools.partial(jax.jit, static_argnames=("config", "prefix"))
def _cached_logits(params: Params, config: LlamaConfig, tokens: Array, prefix: int) -> Array:
    """Logits [B, T - P, V] of rows [B, T] that share their first P tokens, one step of decoding after the other."""
    shared = prefill_prefix(params, config, tokens[0, :prefix]) if prefix else None
    rest = tokens[:, prefix:]
    one = jnp.ones((tokens.shape[0],), jnp.int32)

    def step(cache: Any, token: Array) -> tuple[Any, Array]:
        hidden, cache = hidden_states_cached(params, config, token[:, None], cache, one, prefix=shared)
        return cache, logits(params, config, hidden)[:, 0]

    _, found = jax.lax.scan(step, empty_cache(config, *rest.shape), rest.T)
    return jnp.swapaxes(found, 0, 1)


def _batch(model: Model, rows: int) -> dict[str, np.ndarray]:
    example = training_tokens(model.tokenizer, DIALOGUE)
    room = model.config.max_position_embeddings
    tokens, targets = list(example[0])[:room], list(example[1])[:room]
    examples = [(tokens[: len(tokens) - row % 3], targets[: len(tokens) - row % 3]) for row in range(rows)]
    return example_batch(examples, len(tokens), model.tokenizer.eos_id)


@functools.partial(jax.jit, static_argnames="config")
def _gradients(params: Params, config: LlamaConfig, batch: dict[str, Array]) -> tuple[Params, Array]:
    def sums(params: Params, batch: dict[str, Array]) -> Any:
        states = hidden_states(params, config, batch["tokens"])
        return cross_entropy_sums(logits(params, config, states), batch["tokens"], batch["targets"])

    grads, figures = accumulate_gradients(sums, params, batch, 1)
    return grads, figures["loss"]


def _meshes(config: LlamaConfig, devices: Sequence[jax.Device]) -> list[Mesh]:
    """Every way to lay out the devices that splits the model evenly, with no more than three of them."""
    count, found = len(devices), []
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    for fsdp, tensor in itertools.product(sizes, sizes):
        data = count // (fsdp * tensor)
        heads = (config.num_kv_heads, config.num_heads, config.intermediate_size, config.vocab_size)
        fits = all(size % tensor == 0 for size in heads) and config.hidden_size % fsdp == 0
        if data * fsdp * tensor == count and fits:
            found.append((data, fsdp, tensor))
    # All three axes at work first, then as much of one as there is.
    found.sort(key=lambda sizes: (sum(size == 1 for size in sizes), sizes))
    return [make_mesh(MeshConfig(data=d, fsdp=f, tensor=t), devices) for d, f, t in found[:2]]


CHECKS: dict[int, Callable[[Model], Check]] = {3: check_cache, 7: check_logprobs, 16: check_ratio}
