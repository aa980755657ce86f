"""The scalar head as a reward model and as a critic."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core import heads, llama
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.losses import next_token_logprobs

# Compiled once for each shape.
hidden_states = jax.jit(llama.hidden_states, static_argnames="config")
sequence_scores = jax.jit(heads.sequence_scores, static_argnames="config")

LENGTHS = np.array([7, 1, 4, 6], np.int32)


@pytest.fixture
def scorer(tiny: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params]) -> Params:
    return heads.add_head(make_params(tiny, 2), tiny, jax.random.key(5), stddev=0.7)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 37, (4, 7)).astype(np.int32)


def test_12_score_is_read_at_the_last_real_token(scorer: Params, tiny: LlamaConfig, tokens: np.ndarray) -> None:
    found = np.asarray(sequence_scores(scorer, tiny, jnp.asarray(tokens), jnp.asarray(LENGTHS)))
    kernel = np.asarray(scorer["score"]["kernel"])
    assert found.dtype == np.float32
    for row, length, score in zip(tokens, LENGTHS, found, strict=True):
        alone = np.asarray(hidden_states(scorer, tiny, jnp.asarray(row[:length])[None]))[0, -1]
        np.testing.assert_allclose(score, alone @ kernel, atol=1e-5)
    assert len(set(found.round(3).tolist())) == 4


def test_12_nothing_after_the_last_token_changes_the_score(
    scorer: Params, tiny: LlamaConfig, tokens: np.ndarray
) -> None:
    other = tokens.copy()
    for row, length in zip(other, LENGTHS, strict=True):
        row[length:] = (row[length:] + 11) % 37
    assert (other != tokens).sum() == 28 - LENGTHS.sum()
    scores = [sequence_scores(scorer, tiny, jnp.asarray(rows), jnp.asarray(LENGTHS)) for rows in (tokens, other)]
    np.testing.assert_array_equal(*scores)
    changed = tokens.copy()
    changed[np.arange(4), LENGTHS - 1] = (changed[np.arange(4), LENGTHS - 1] + 1) % 37
    moved = sequence_scores(scorer, tiny, jnp.asarray(changed), jnp.asarray(LENGTHS))
    assert (np.abs(np.asarray(moved) - np.asarray(scores[0])) > 1e-4).all()


def test_12_an_empty_row_scores_nan_and_leaves_the_others_alone(
    scorer: Params, tiny: LlamaConfig, tokens: np.ndarray
) -> None:
    found = sequence_scores(scorer, tiny, jnp.asarray(tokens), jnp.asarray([7, 0, 4, 6], jnp.int32))
    expected = sequence_scores(scorer, tiny, jnp.asarray(tokens), jnp.asarray(LENGTHS))
    assert np.isnan(found[1])
    np.testing.assert_array_equal(np.delete(found, 1), np.delete(expected, 1))


@partial(jax.jit, static_argnums=1)
def everything(params: Params, config: LlamaConfig, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    logits = llama.logits(params, config, llama.hidden_states(params, config, tokens))
    values = heads.token_scores(params, config, tokens)
    return next_token_logprobs(logits, tokens, 0.7), values, heads.sequence_scores(params, config, tokens, lengths)


def test_04_padding_and_batch_mates_change_no_logprob_value_or_score(
    scorer: Params, tiny: LlamaConfig, tokens: np.ndarray
) -> None:
    logprobs, values, scores = everything(scorer, tiny, jnp.asarray(tokens), jnp.asarray(LENGTHS))
    for index, length in enumerate(LENGTHS):
        for padding in (0, 5):
            row = jnp.pad(jnp.asarray(tokens)[index : index + 1, :length], ((0, 0), (0, padding)))
            alone = everything(scorer, tiny, row, jnp.asarray([length], jnp.int32))
            np.testing.assert_allclose(alone[0][0, :length], logprobs[index, :length], atol=1e-5)
            np.testing.assert_allclose(alone[1][0, :length], values[index, :length], atol=1e-5)
            np.testing.assert_allclose(alone[2][0], scores[index], atol=1e-5)


def test_a_head_is_added_replaced_and_named(tiny: LlamaConfig, scorer: Params) -> None:
    zero = heads.add_head(scorer, tiny, jax.random.key(0))
    assert not np.asarray(zero["score"]["kernel"]).any()
    assert np.asarray(scorer["score"]["kernel"]).std() > 0.3, "the given tree is left as it was"
    axes = {**llama.logical_axes(tiny), **heads.head_axes()}
    assert jax.tree.structure(zero) == jax.tree.structure(axes, is_leaf=lambda node: isinstance(node, tuple))
