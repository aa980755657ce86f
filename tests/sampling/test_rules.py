"""The nucleus against a sort, the draws against the nucleus."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from almost_jax.sampling.rules import SamplingRules, draw, nucleus


def rules(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> SamplingRules:
    return SamplingRules(temperature, top_p, top_k, max_new_tokens=3, stop_tokens=())


def oracle(scaled: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The kept set of one row [V], by a stable sort in float64: best first, of equals the lowest id first."""
    order = np.argsort(-scaled.astype(np.float64), kind="stable")
    order = order[: top_k or None]
    weights = np.exp(scaled[order].astype(np.float64) - scaled.max())
    before = np.cumsum(weights) - weights
    keep = np.zeros(scaled.shape, bool)
    keep[order[before < top_p * weights.sum()]] = True
    return keep


# Off, and edges that fall early, late and past the vocabulary's end.
SETTINGS = [(0, 0.03), (0, 0.37), (0, 0.9973), (1, 0.9), (6, 1.0), (6, 0.61), (29, 0.9), (5000, 0.77)]
kept_set = jax.jit(nucleus, static_argnames="rules")


@pytest.mark.parametrize("vocab", [1, 37, 415])
@pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
def test_09_kept_set_equals_sort(vocab: int, top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(vocab)
    smooth = rng.normal(size=(40, vocab)) * rng.uniform(0.1, 6, size=(40, 1))
    # A few levels only, as logits of a bfloat16 product have: every edge falls among ties.
    tied = rng.integers(-3, 3, size=(40, vocab)) * 0.75
    scaled = np.concatenate([smooth, tied]).astype(np.float32)
    kept = np.asarray(kept_set(scaled, rules=rules(top_k=top_k, top_p=top_p)))
    for row in range(len(scaled)):
        np.testing.assert_array_equal(kept[row], oracle(scaled[row], top_k, top_p), err_msg=f"row {row}")


def test_09_kept_set_by_hand() -> None:
    scaled = jnp.log(jnp.array([[0.2, 0.4, 0.2, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]]))
    kept = np.asarray(kept_set(scaled, rules=rules(top_p=0.55)))
    np.testing.assert_array_equal(kept, [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    # top-p is of what top-k leaves: of (.4, .2, .2) over .8 the first two hold .75.
    kept = np.asarray(kept_set(scaled, rules=rules(top_k=3, top_p=0.7)))
    np.testing.assert_array_equal(kept, [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def test_09_weightless_tokens_are_never_kept() -> None:
    scaled = jnp.array([[-1e4, 3.0, -2e4, 3.0, 0.0], [1e4, 0.0, 0.0, 0.0, 0.0]], jnp.float32)
    for top_p in (0.4, 0.99, 1 - 1e-8):
        kept = np.asarray(kept_set(scaled, rules=rules(top_p=top_p)))
        assert not kept[0, [0, 2]].any() and kept[0, 1]
        np.testing.assert_array_equal(kept[1], [1, 0, 0, 0, 0])


@pytest.mark.parametrize("top_p", [1e-45, 1e-39, 1.2e-38, 1e-30])
def test_a_tiny_share_is_the_likeliest_token(top_p: float) -> None:
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, 300)), jnp.float32)
    keep = np.asarray(nucleus(logits, rules(top_p=top_p)))
    assert keep.sum(axis=1).tolist() == [1] * 5
    np.testing.assert_array_equal(keep.argmax(axis=1), np.asarray(logits).argmax(axis=1))


@pytest.mark.parametrize("temperature", [-1.0, 1e-39, 1e-7, math.inf, math.nan])
def test_temperatures_that_no_logits_stand_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature .* must be 0"):
        rules(temperature)


@pytest.mark.parametrize(
    ("vocab", "temperature", "top_k", "top_p"),
    [(37, 1.0, 0, 1.0), (37, 0.7, 0, 0.8), (101, 1.7, 11, 1.0), (211, 1.3, 23, 0.85), (3, 0.5, 0, 1.0)],
)
def test_09_frequencies_pass_chi_square(vocab: int, temperature: float, top_k: int, top_p: float) -> None:
    count = 40_000
    logits = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32) * 1.5
    chosen = rules(temperature, top_p, top_k)
    keys = jax.random.split(jax.random.key(5), count)
    tokens, _ = jax.jit(draw, static_argnums=2)(jnp.broadcast_to(jnp.asarray(logits), (count, vocab)), keys, chosen)
    seen = np.bincount(np.asarray(tokens), minlength=vocab)

    keep = oracle(logits / np.float32(temperature), top_k, top_p)
    assert seen[~keep].sum() == 0
    expected = np.where(keep, np.exp(logits.astype(np.float64) / temperature), 0)
    expected *= count / expected.sum()
    # Cells of fewer than 5 expected draws are put together, as the test's approximation asks.
    large = expected >= 5
    cells = np.append(expected[large], expected[~large].sum()), np.append(seen[large], seen[~large].sum())
    if cells[0][-1] < 5:
        cells = cells[0][:-1], cells[1][:-1]
        cells = cells[0] * cells[1].sum() / cells[0].sum(), cells[1]
    assert stats.chisquare(cells[1], cells[0]).pvalue > 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1000, 0.97)])
def test_06_rounding_of_the_logits_hardly_moves_a_draw(top_k: int, top_p: float) -> None:
    """Another program shape rounds logits otherwise; over a real vocabulary no token may hang on that."""
    rng, rows, vocab = np.random.default_rng(0), 256, 50_001
    logits = rng.normal(size=(rows, vocab)).astype(np.float32) * 3
    noise = rng.normal(size=(rows, vocab)).astype(np.float32) * 1e-4
    keys = jax.random.split(jax.random.key(9), rows)
    drawn = jax.jit(draw, static_argnums=2)
    first, other = (np.asarray(drawn(one, keys, rules(1.0, top_p, top_k))[0]) for one in (logits, logits + noise))
    assert len(set(first.tolist())) > rows // 2, "draws must spread to prove anything"
    # Of a running sum's edges every hundredth would move.
    assert (first != other).sum() <= 1


def test_logprobs_are_of_the_whole_vocabulary_at_the_sampling_temperature() -> None:
    logits = np.random.default_rng(3).normal(size=(13, 29)).astype(np.float32) * 4
    keys = jax.random.split(jax.random.key(1), 13)
    for temperature, top_p, top_k in [(0.7, 0.5, 4), (1.9, 1.0, 0), (0.0, 1.0, 0)]:
        tokens, logprobs = draw(jnp.asarray(logits), keys, rules(temperature, top_p, top_k))
        wide = logits.astype(np.float64) / (temperature or 1.0)
        expected = (
            wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
        )
        np.testing.assert_allclose(logprobs, expected[np.arange(13), np.asarray(tokens)], atol=1e-5)
        assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32


def test_greedy_takes_the_first_of_the_best() -> None:
    tokens, _ = draw(jnp.array([[1.0, 7.0, 7.0], [2.0, 1.0, 2.0]]), jax.random.split(jax.random.key(0)), rules(0.0))
    np.testing.assert_array_equal(tokens, [1, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_impossible_rules_are_refused(field: str, value: float) -> None:
    good = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 3, "stop_tokens": ()}
    with pytest.raises(ValueError, match=field):
        SamplingRules(**{**good, field: value})
