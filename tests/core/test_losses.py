"""Masked reductions, token log-probabilities and the supervised losses against numpy and against cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from almost_jax.config import MeshConfig
from almost_jax.core import losses
from almost_jax.core.partitioning import batch_sharding, make_mesh

LENGTHS = np.array([6, 1, 3, 0, 5, 2, 6, 4], np.int32)
MASK = np.arange(6)[None] < LENGTHS[:, None]


def ragged(seed: int, padding: float) -> np.ndarray:
    """[8, 6] around 3, `padding` outside the mask."""
    x = 3 + 2 * np.random.default_rng(seed).normal(size=MASK.shape)
    return np.where(MASK, x, padding).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64) - x.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_length_mask_and_window_cut_each_row_from_its_own_start() -> None:
    np.testing.assert_array_equal(losses.length_mask(jnp.asarray(LENGTHS), 6), MASK)
    x = jnp.arange(10).reshape(2, 5)
    np.testing.assert_array_equal(losses.window(x, jnp.asarray([1, 3]), 3), [[1, 2, 3], [8, 9, 9]])
    wide = jnp.stack([x, -x], axis=-1)
    np.testing.assert_array_equal(losses.window(wide, jnp.asarray([0, 2]), 2)[..., 1], [[0, -1], [-7, -8]])


@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e30])
def test_masked_reductions_never_see_the_padding(padding: float) -> None:
    x, mask = ragged(0, padding), jnp.asarray(MASK)
    real = x[MASK].astype(np.float64)
    np.testing.assert_allclose(losses.masked_sum(jnp.asarray(x), mask), real.sum(), rtol=1e-5)
    np.testing.assert_allclose(losses.masked_mean(jnp.asarray(x), mask), real.mean(), rtol=1e-5)
    np.testing.assert_allclose(losses.masked_var(jnp.asarray(x), mask), real.var(ddof=0), rtol=1e-5)
    assert losses.count(mask) == 27
    assert losses.masked_mean(jnp.asarray(x), jnp.zeros_like(mask)) == 0


@pytest.mark.parametrize("padding", [np.nan, 1e30])
def test_18_whitening_is_masked_with_population_variance(padding: float) -> None:
    x = ragged(1, padding)
    real = x[MASK].astype(np.float64)
    white = np.asarray(losses.whiten(jnp.asarray(x), jnp.asarray(MASK), shift_mean=True))
    np.testing.assert_allclose(white[MASK], (real - real.mean()) / real.std(ddof=0), atol=1e-5)
    assert not np.allclose(white[MASK], (real - real.mean()) / real.std(ddof=1), atol=1e-3)
    np.testing.assert_array_equal(white[~MASK], 0)


def test_18_whitened_rewards_keep_their_mean() -> None:
    x = ragged(2, np.nan)
    real = x[MASK].astype(np.float64)
    white = np.asarray(losses.whiten(jnp.asarray(x), jnp.asarray(MASK), shift_mean=False))
    np.testing.assert_allclose(white[MASK].mean(), real.mean(), rtol=1e-5)
    np.testing.assert_allclose(white[MASK].std(), 1, rtol=1e-5)
    np.testing.assert_array_equal(white[~MASK], 0)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_18_whitening_on_one_device_equals_eight(sizes: tuple[int, int, int], shift_mean: bool) -> None:
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    x, mask = jnp.asarray(ragged(3, np.nan)), jnp.asarray(MASK)
    with jax.set_mesh(mesh):
        split = jax.device_put((x, mask), batch_sharding(mesh))
        assert not split[0].sharding.is_fully_replicated
        found = jax.jit(losses.whiten, static_argnums=2)(*split, shift_mean)
        whole = jax.device_put((x, mask), NamedSharding(mesh, PartitionSpec()))
        np.testing.assert_allclose(jax.jit(losses.whiten, static_argnums=2)(*whole, shift_mean), found, atol=1e-6)
    np.testing.assert_allclose(found, losses.whiten(x, mask, shift_mean), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.9])
def test_logprobs_and_entropy_equal_numpy_at_any_temperature(temperature: float) -> None:
    rng = np.random.default_rng(4)
    logits, tokens = 4 * rng.normal(size=(2, 5, 9)).astype(np.float32), rng.integers(0, 9, (2, 5)).astype(np.int32)
    table = log_softmax(logits / (temperature or 1.0))
    rows, places = np.indices(tokens.shape)
    found = losses.token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), temperature)
    np.testing.assert_allclose(found, table[rows, places, tokens], atol=1e-5)
    shifted = losses.next_token_logprobs(jnp.asarray(logits), jnp.asarray(tokens), temperature)
    np.testing.assert_allclose(shifted[:, 1:], table[rows[:, 1:], places[:, 1:] - 1, tokens[:, 1:]], atol=1e-5)
    np.testing.assert_array_equal(shifted[:, 0], 0)
    expected = -(np.exp(table) * table).sum(-1)
    np.testing.assert_allclose(losses.entropy(jnp.asarray(logits), temperature), expected, atol=1e-5)


def test_logprobs_are_float32_from_bfloat16_logits_and_survive_large_ones() -> None:
    logits = jnp.asarray([[[3e4, -3e4, 0.0], [1.0, 2.0, 3.0]]], jnp.bfloat16)
    tokens = jnp.asarray([[1, 2]], jnp.int32)
    found = losses.token_logprobs(logits, tokens, 1.0)
    assert found.dtype == jnp.float32 and losses.entropy(logits, 1.0).dtype == jnp.float32
    np.testing.assert_allclose(found[0, 0], -6e4, rtol=1e-2)
    np.testing.assert_allclose(found[0, 1], -np.log(1 + np.exp(-1) + np.exp(-2)), rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(logits, 1.0)[0, 0], 0, atol=1e-6)


def test_cross_entropy_counts_the_selected_targets_only() -> None:
    rng = np.random.default_rng(6)
    logits, tokens = rng.normal(size=(2, 4, 5)).astype(np.float32), rng.integers(0, 5, (2, 4)).astype(np.int32)
    mask = np.array([[True, False, True, True], [True, True, False, False]])
    total, (number, metrics) = losses.cross_entropy_sums(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(mask))
    table, targets = log_softmax(logits), [(0, 2), (0, 3), (1, 1)]
    np.testing.assert_allclose(total, -sum(table[b, t - 1, tokens[b, t]] for b, t in targets), rtol=1e-5)
    assert number == 3, "place 0 of a row is predicted by nothing"
    hits = sum(int(logits[b, t - 1].argmax() == tokens[b, t]) for b, t in targets)
    assert (float(metrics["accuracy"][0]), float(metrics["accuracy"][1])) == (hits, 3)
    other = jnp.asarray(logits).at[0, 0].set(1e3).at[1, 1:].set(-7.0)
    again = losses.cross_entropy_sums(other, jnp.asarray(tokens).at[1, 2:].set(0), jnp.asarray(mask))[0]
    np.testing.assert_allclose(again, total, rtol=1e-6)
    # Where all tokens are as likely none is the most likely one, so that a constant model is never accurate.
    constant = losses.cross_entropy_sums(jnp.zeros((2, 4, 5)), jnp.asarray(tokens), jnp.asarray(mask))
    assert constant[1][1]["accuracy"][0] == 0


def test_13_ranking_loss_is_finite_at_huge_margins() -> None:
    difference = jnp.asarray([1e4, -1e4, 0.0], jnp.float32)

    def loss(difference: jax.Array) -> jax.Array:
        return losses.pairwise_ranking_loss(difference, jnp.zeros_like(difference), 0.0)

    np.testing.assert_allclose(loss(difference), [0, 1e4, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda d: loss(d).sum())(difference), [0, -1, -0.5], atol=1e-6)


def test_13_swapping_chosen_and_rejected_mirrors_the_loss() -> None:
    chosen, rejected = jnp.asarray([1.3, -2.0, 0.4], jnp.float32), jnp.asarray([0.1, 5.0, 0.4], jnp.float32)
    straight = losses.pairwise_ranking_loss(chosen, rejected, 0.0)
    swapped = losses.pairwise_ranking_loss(rejected, chosen, 0.0)
    np.testing.assert_allclose(swapped - straight, chosen - rejected, atol=1e-6)
    np.testing.assert_allclose(jnp.exp(-straight) + jnp.exp(-swapped), 1, rtol=1e-6)
    np.testing.assert_allclose(losses.pairwise_accuracy(chosen, rejected), [1, 0, 0.5])
    np.testing.assert_allclose(losses.pairwise_accuracy(rejected, chosen), [0, 1, 0.5])


def test_ranking_loss_with_margin_and_centering_by_hand() -> None:
    chosen, rejected = jnp.asarray([2.0, 1.0], jnp.float32), jnp.asarray([0.5, -3.0], jnp.float32)
    total, (pairs, metrics) = losses.pairwise_sums(chosen, rejected, 0.25, 0.1)
    expected = np.log1p(np.exp(-(1.5 - 0.25))) + np.log1p(np.exp(-(4 - 0.25))) + 0.1 * (2.5**2 + 2.0**2)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert pairs == 2
    assert {name: float(a / b) for name, (a, b) in metrics.items()} == {"accuracy": 1, "margin": 2.75, "score": 0.125}


def test_places_without_a_pair_count_for_nothing() -> None:
    chosen, rejected = jnp.asarray([[2.0, jnp.nan], [1.0, 7.0]]), jnp.asarray([[0.5, 1.0], [-3.0, jnp.inf]])
    total, (pairs, metrics) = losses.pairwise_sums(chosen, rejected, 0.25, 0.1, jnp.asarray([[1, 0], [1, 0]], bool))
    expected, (number, figures) = losses.pairwise_sums(chosen[:, 0], rejected[:, 0], 0.25, 0.1)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert pairs == number == 2
    assert {name: float(a / b) for name, (a, b) in metrics.items()} == pytest.approx(
        {name: float(a / b) for name, (a, b) in figures.items()}
    )


def test_scores_below_float32_are_ranked_in_float32() -> None:
    chosen, rejected = jnp.asarray([100.0], jnp.bfloat16), jnp.asarray([99.5], jnp.bfloat16)
    total, (_, metrics) = losses.pairwise_sums(chosen, rejected, 0.0, 0.0)
    assert total.dtype == jnp.float32 and all(x.dtype == jnp.float32 for pair in metrics.values() for x in pair)
    np.testing.assert_allclose(total, np.log1p(np.exp(-0.5)), rtol=1e-5)
