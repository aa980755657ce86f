"""Scores and log-probs of given sequences, in few shapes: sorted by length, padded to buckets, order restored."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import Array

from almost_jax.core.heads import sequence_scores
from almost_jax.core.llama import LlamaConfig, Params, hidden_states
from almost_jax.core.partitioning import to_host
from almost_jax.core.vocabulary import hidden_figures
from almost_jax.sampling.padding import pad_batch

_sequence_scores = jax.jit(sequence_scores, static_argnames="config")


def score_sequences(
    params: Params, config: LlamaConfig, sequences: Sequence[Sequence[int]], *, batch_size: int, multiple: int
) -> np.ndarray:
    """A reward model's score of every sequence at its last token, before normalisation.

    Args:
        params: a tree with a scalar head.
        config: the model's shape.
        sequences: n rows of tokens.
        batch_size: rows per program.
        multiple: rows are padded to a multiple of it.

    Returns:
        [n] float32, in the order of `sequences`.

    Raises:
        ValueError: a sequence is empty.
    """
    scores = np.zeros(len(sequences), np.float32)
    for places, tokens, lengths in _batches(sequences, batch_size, multiple):
        drawn = to_host(_sequence_scores(params, config, tokens, lengths))
        scores[places] = drawn[: len(places)]
    return scores


def completion_logprobs(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float,
    batch_size: int,
    multiple: int,
) -> list[np.ndarray]:
    """The log-prob of every token of every completion after its prompt, over the whole vocabulary.

    Args:
        params: the model's tree.
        config: the model's shape.
        prompts, completions: n rows of tokens each; a completion may be empty.
        temperature: divides the logits; 0, which is greedy, scores at temperature 1, as the sampler does.
        batch_size: rows per program.
        multiple: rows are padded to a multiple of it.

    Returns:
        n float32 arrays, of the completions' lengths.

    Raises:
        ValueError: a prompt is empty, or the two differ in number.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts can't go with {len(completions)} completions: give as many of each")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: its completion's first token would have no log-prob")
    rows = [(*prompt, *completion) for prompt, completion in zip(prompts, completions, strict=True)]
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    for places, tokens, _ in _batches(rows, batch_size, multiple):
        logprobs = to_host(_next_token_logprobs(params, config, tokens, temperature))
        for row, place in enumerate(places):
            found[place] = logprobs[row, len(prompts[place]) - 1 : len(rows[place]) - 1]
    return found


@functools.partial(jax.jit, static_argnames=("config", "temperature"))
def _next_token_logprobs(params: Params, config: LlamaConfig, tokens: Array, temperature: float) -> Array:
    """Log-probs [B, T - 1] of tokens 1.. of each row [B, T], given what stands before them."""
    states = hidden_states(params, config, tokens[:, :-1])
    return hidden_figures(params, config, states, tokens[:, 1:], temperature, with_entropy=False).logprobs


def _batches(
    rows: Sequence[Sequence[int]], batch_size: int, multiple: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Neighbours in length as full batches: the rows' places, their tokens [B, T] and lengths [B]."""
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"sequence {index} is empty: there is no last token to score")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        yield places, *pad_batch([rows[place] for place in places], batch_size, multiple)
