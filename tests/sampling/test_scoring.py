"""Scores and log-probs in batches against one row at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core.heads import add_head, sequence_scores
from almost_jax.core.llama import LlamaConfig
from almost_jax.sampling.scoring import completion_logprobs, score_sequences


def rows(count: int, seed: int, shortest: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, rng.integers(shortest, 19)).tolist() for _ in range(count)]


def test_04_12_scores_do_not_depend_on_padding_or_batch_mates(tiny: LlamaConfig, make_params: Any) -> None:
    params = add_head(make_params(tiny, 1), tiny, jax.random.key(4), stddev=0.7)
    sequences = [*rows(5, 0), [7]]
    alone = jax.jit(sequence_scores, static_argnames="config")
    expected = [
        float(alone(params, tiny, jnp.asarray([row], jnp.int32), jnp.asarray([len(row)], jnp.int32))[0])
        for row in sequences
    ]
    assert np.std(expected) > 0.1
    for batch_size, multiple in [(4, 8), (16, 5)]:
        found = score_sequences(params, tiny, sequences, batch_size=batch_size, multiple=multiple)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert score_sequences(params, tiny, [], batch_size=4, multiple=8).shape == (0,)


def test_12_an_empty_sequence_is_an_error(tiny: LlamaConfig, make_params: Any) -> None:
    params = add_head(make_params(tiny, 1), tiny, jax.random.key(4), stddev=0.7)
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        score_sequences(params, tiny, [[3], [], [4, 5]], batch_size=4, multiple=8)


def test_04_07_completion_logprobs_equal_one_row_at_a_time(
    tiny: LlamaConfig, make_params: Any, full_logits: Any
) -> None:
    params = make_params(tiny, 1)
    prompts, completions = rows(9, 1), [*rows(8, 2), []]
    plain = [
        full_logits(params, tiny, prompt + completion).astype(np.float64)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    for temperature, batch_size, multiple in [(0.0, 4, 8), (1.0, 16, 5), (0.3, 4, 8)]:
        found = completion_logprobs(
            params, tiny, prompts, completions, temperature=temperature, batch_size=batch_size, multiple=multiple
        )
        for prompt, completion, logits, logprobs in zip(prompts, completions, plain, found, strict=True):
            scaled = logits / (temperature or 1.0)
            whole = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
            places = np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
            np.testing.assert_allclose(logprobs, whole[places, completion], atol=1e-4)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        completion_logprobs(params, tiny, [[1], []], [[2], [2]], temperature=1.0, batch_size=4, multiple=8)
    with pytest.raises(ValueError, match="2 prompts can't go with 1"):
        completion_logprobs(params, tiny, [[1], [1]], [[2]], temperature=1.0, batch_size=4, multiple=8)
