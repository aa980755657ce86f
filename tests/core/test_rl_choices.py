"""The choices of PPO that are off by default: KL in the loss, dual clip, other averages over ragged rows, no clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core import losses, rl

AVERAGES = ("token_mean", "sequence_mean", "fixed_length")
POLICY = np.array([0.45, 0.3, 0.2, 0.05])
OLD = np.array([0.25, 0.25, 0.3, 0.2])
REFERENCE = np.array([0.1, 0.35, 0.15, 0.4])


def expectation(kind: str, differentiated: bool) -> tuple[float, np.ndarray]:
    """The exact expectation of `kl_loss` over tokens that the old policy draws, and its gradient in the logits.

    A row for every token, weighted by how often it would be drawn.
    """
    draws = jnp.arange(4)
    mask = jnp.ones((4, 1), bool)

    def loss(logits: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits)[draws][:, None]
        old, reference = (jnp.asarray(np.log(p), jnp.float32)[draws][:, None] for p in (OLD, REFERENCE))
        if differentiated:
            terms = [
                rl.kl_loss(*(x[row : row + 1] for x in (logprobs, old, reference)), mask[:1], kind, "token_mean")
                for row in range(4)
            ]
            each = jnp.stack([total / weight for total, (weight, _) in terms])
        else:
            each = rl.kl_estimates(logprobs, reference, kind)[:, 0]
        return jnp.sum(jnp.asarray(OLD if differentiated else POLICY, jnp.float32) * each)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(np.log(POLICY), jnp.float32))
    return float(value), np.asarray(gradient)


def true_gradient(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Of KL(p || q) in the logits of p: p (log p / q - KL)."""
    ratio = np.log(p / q)
    return p * (ratio - (p * ratio).sum())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_19_kl_in_the_loss_has_the_gradient_of_the_kl_even_off_policy(kind: str) -> None:
    value, gradient = expectation(kind, differentiated=True)
    np.testing.assert_allclose(gradient, true_gradient(POLICY, REFERENCE), atol=1e-6)
    if kind != "k2":
        assert value == pytest.approx((POLICY * np.log(POLICY / REFERENCE)).sum(), abs=1e-6)


def test_19_differentiating_the_estimators_as_they_stand_would_not() -> None:
    """What `kl_loss` is there to avoid: k1 gives 0, and k3 the gradient of the KL the other way round."""
    np.testing.assert_allclose(expectation("k1", differentiated=False)[1], 0, atol=1e-6)
    other_way = POLICY - REFERENCE
    np.testing.assert_allclose(expectation("k3", differentiated=False)[1], other_way, atol=1e-6)
    np.testing.assert_allclose(
        expectation("k2", differentiated=False)[1], true_gradient(POLICY, REFERENCE), atol=1e-6
    )


def test_24_kl_in_the_loss_ignores_what_lies_under_the_mask() -> None:
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    arrays = [jnp.where(mask, x, jnp.nan) for x in jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3)))]
    for kind in ("k1", "k2", "k3"):
        def loss(x: jax.Array, kind: str = kind) -> jax.Array:
            return rl.kl_loss(x, *arrays[1:], mask, kind, "token_mean")[0]

        total, gradient = jax.value_and_grad(loss)(arrays[0])
        assert np.isfinite(total) and np.isfinite(gradient).all()
        assert (np.asarray(gradient)[~np.asarray(mask)] == 0).all() and np.abs(gradient).max() > 0.1


def test_21_dual_clip_bounds_the_loss_of_negative_advantages_by_hand() -> None:
    """Eps 0.2, c 3. Columns: bounded; below the bound; clipped below it; a positive one is never bounded; padding."""
    ratios = np.array([[5.0, 2.0, 0.5, 5.0, 9.0]])
    advantages = jnp.asarray([[-2.0, -2.0, -2.0, 2.0, -1.0]], jnp.float32)
    old = jnp.full((1, 5), -1.5, jnp.float32)
    logprobs = old + jnp.asarray(np.log(ratios), jnp.float32)
    mask = jnp.asarray([[True, True, True, True, False]])

    def loss(x: jax.Array) -> losses.LossTerms:
        return rl.policy_loss(x, old, advantages, mask, 0.2, 3.0, "token_mean")

    total, (tokens, metrics) = loss(logprobs)
    np.testing.assert_allclose(total, 6.0 + 4.0 + 1.6 - 2.4, rtol=1e-5)
    assert float(metrics["dual_clip_fraction"][0] / metrics["dual_clip_fraction"][1]) == 1 / 4
    gradient = jax.grad(lambda x: loss(x)[0])(logprobs)
    np.testing.assert_allclose(gradient, [[0, 4.0, 0, 0, 0]], atol=1e-5)
    plain, (_, names) = rl.policy_loss(logprobs, old, advantages, mask, 0.2, 0.0, "token_mean")
    np.testing.assert_allclose(plain, 10.0 + 4.0 + 1.6 - 2.4, rtol=1e-5)
    assert "dual_clip_fraction" not in names


def test_21_without_a_value_clip_the_loss_is_half_the_squared_error() -> None:
    values, returns = jnp.asarray([[1.0, 5.0]]), jnp.asarray([[0.0, 2.0]])
    total, (_, metrics) = rl.value_loss(values, jnp.zeros((1, 2)), returns, jnp.ones((1, 2), bool), 0.0, "token_mean")
    np.testing.assert_allclose(total, 0.5 * (1 + 9))
    assert metrics["value_clip_fraction"][0] == 0


def test_averages_over_ragged_rows_by_hand() -> None:
    x = jnp.asarray([[1.0, 2.0, 3.0, 6.0], [10.0, np.nan, np.nan, np.nan], [np.nan] * 4])
    mask = losses.length_mask(jnp.asarray([4, 1, 0]), 4)
    found = {name: [float(value) for value in rl.averaged(x, mask, name)] for name in AVERAGES}
    # 22 over 5 tokens; the means 3 and 10 of two responses that have tokens; 22 over 3 responses of up to 4.
    assert found == {"token_mean": [22, 5], "sequence_mean": [13, 2], "fixed_length": [22, 12]}
    with pytest.raises(ValueError, match="'mean' is unknown; known: token_mean, sequence_mean, fixed_length"):
        rl.averaged(x, mask, "mean")


@pytest.mark.parametrize("average", AVERAGES)
def test_22_every_average_adds_up_over_micro_batches(average: str) -> None:
    rng = np.random.default_rng(1)
    mask = losses.length_mask(jnp.asarray([5, 1, 3, 2, 4, 5]), 5)
    arrays = [jnp.asarray(x) for x in rng.normal(size=(4, 6, 5)).astype(np.float32)]

    def loss(rows: slice) -> tuple[float, float]:
        part = [x[rows] for x in arrays]
        policy = rl.policy_loss(part[0], part[1], part[2], mask[rows], 0.2, 0.0, average)
        value = rl.value_loss(part[3], part[1], part[2], mask[rows], 0.2, average)
        total, (weight, _) = rl.ppo_loss(policy, value, part[1], mask[rows], 0.3, 0.1, average)
        return float(total), float(weight)

    whole, parts = loss(slice(0, 6)), [loss(slice(start, start + 2)) for start in (0, 2, 4)]
    np.testing.assert_allclose(whole[0] / whole[1], sum(p[0] for p in parts) / sum(p[1] for p in parts), rtol=1e-5)
