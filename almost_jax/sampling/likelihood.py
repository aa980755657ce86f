"""How likely given continuations are, for many that share their beginning: prefixes and positions are computed once.

Where `sampling.scoring` gives every log-prob of a few texts, this is for benchmarks: thousands of choices behind one
prompt. What all contexts begin with goes through the model once, the output matrix is applied where a continuation is
predicted and nowhere else, and each token is also compared with the likeliest one.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from almost_jax.core.llama import LlamaConfig, Params, Prefix, hidden_states, logits, prefill_prefix
from almost_jax.core.losses import token_logprobs
from almost_jax.sampling.padding import pad_batch

# A shorter shared beginning isn't worth a program of its own.
_MIN_SHARED = 16

_prefill = jax.jit(prefill_prefix, static_argnames="config")


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: the log-prob of each token [N] float32, and whether each was the likeliest one."""

    logprobs: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        """The log-prob of the whole continuation."""
        return float(self.logprobs.sum(dtype=np.float64))


def continuation_likelihoods(
    params: Params,
    config: LlamaConfig,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int,
    multiple: int,
) -> list[Likelihood]:
    """Score every continuation after its context, over the whole vocabulary, at temperature 1.

    Args:
        params: the model's tree.
        config: the model's shape.
        contexts: n rows of at least one token.
        continuations: n rows; an empty one has the log-prob 0.
        batch_size: rows per program; a mesh needs a multiple of the devices that batches are split over.
        multiple: rows, and the places that are scored, are padded to it times 1 to 8, 10, 12, 14, 16, 20, ...

    Returns:
        n likelihoods, in the order given.

    Raises:
        ValueError: a context is empty, or the two differ in number.
    """
    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts can't go with {len(continuations)} continuations")
    for index, context in enumerate(contexts):
        if not len(context):
            raise ValueError(f"context {index} is empty: its continuation's first token would have no log-prob")
    found = [Likelihood(np.zeros(0, np.float32), True)] * len(contexts)
    # Continuations that differ in their last token alone, as the letters of a multiple choice do, are one row.
    rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if len(continuation):
            rows.setdefault(((*context, *continuation[:-1]), len(continuation)), []).append(index)
    wanted = sorted(rows.items(), key=lambda row: len(row[0][0]))
    if not wanted:
        return found
    shared = _shared_length([contexts[indices[0]] for _, indices in wanted])
    prefix: Prefix | None = None
    if len(wanted) > 1 and shared >= _MIN_SHARED:
        prefix = _prefill(params, config, jnp.asarray(wanted[0][0][0][:shared], jnp.int32))
    else:
        shared = 0
    for first in range(0, len(wanted), batch_size):
        group = wanted[first : first + batch_size]
        texts = [text[shared:] for (text, _), _ in group]
        tokens, lengths = pad_batch(texts, batch_size, _bucket(max(map(len, texts)), multiple))
        width = _bucket(max(size for (_, size), _ in group), multiple)
        lasts = _bucket(max(len(indices) for _, indices in group), 1)
        targets, places = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), np.int32)
        endings = np.zeros((batch_size, lasts), np.int32)
        for row, ((_, size), indices) in enumerate(group):
            targets[row, :size] = continuations[indices[0]]
            places[row, :size] = np.arange(lengths[row] - size, lengths[row])
            endings[row, : len(indices)] = [continuations[index][-1] for index in indices]
        scored = jax.device_get(_score(params, config, tokens, lengths - 1, places, targets, endings, prefix))
        for row, ((_, size), indices) in enumerate(group):
            greedy = bool(scored.likeliest[row, : size - 1].all())
            for place, index in enumerate(indices):
                logprobs = np.append(scored.logprobs[row, : size - 1], scored.endings[row, place])
                found[index] = Likelihood(logprobs, greedy and bool(scored.likeliest_endings[row, place]))
    return found


@struct.dataclass
class _Scored:
    """Log-probs of targets [B, G] and endings [B, E], and whether each is the likeliest token at its place."""

    logprobs: Array
    likeliest: Array
    endings: Array
    likeliest_endings: Array


@functools.partial(jax.jit, static_argnames="config")
def _score(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    last: Array,
    places: Array,
    targets: Array,
    endings: Array,
    prefix: Prefix | None,
) -> _Scored:
    """Score `targets` [B, G] as predicted at `places` [B, G] of the rows [B, T], and `endings` [B, E] at `last` [B]."""
    hidden = hidden_states(params, config, tokens, prefix=prefix)
    # One more column, for the place that predicts the endings.
    every = jnp.concatenate([places, last[:, None]], axis=1)
    predictions = logits(params, config, jnp.take_along_axis(hidden, every[:, :, None], axis=1))
    best = jnp.argmax(predictions, axis=-1)
    final = jnp.broadcast_to(predictions[:, -1:], (*endings.shape, predictions.shape[-1]))
    return _Scored(
        token_logprobs(predictions[:, :-1], targets, 1.0),
        best[:, :-1] == targets,
        token_logprobs(final, endings, 1.0),
        best[:, -1:] == endings,
    )


def _bucket(length: int, multiple: int) -> int:
    """The least of 1 to 8, 10, 12, 14, 16, 20, ... times the multiple that holds a length."""
    steps = 1
    while steps * multiple < length:
        steps += 1 << max(steps.bit_length() - 3, 0)
    return steps * multiple


def _shared_length(contexts: Sequence[Sequence[int]]) -> int:
    """How many tokens all contexts begin with; each keeps one of its own at least."""
    first, limit = contexts[0], min(len(context) for context in contexts) - 1
    for context in contexts[1:]:
        place = 0
        while place < limit and context[place] == first[place]:
            place += 1
        limit = place
    return limit
