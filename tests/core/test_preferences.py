"""DPO's losses on cases computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core.preferences import preference_loss, preference_sums


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_by_hand() -> None:
    ratios = jnp.array([[1.5, -0.5], [-2.0, 1.0], [0.25, 0.25]])
    found = preference_loss(ratios, 0.3, 0.0, "sigmoid")
    np.testing.assert_allclose(found, [-math.log(sigmoid(0.6)), -math.log(sigmoid(-0.9)), math.log(2)], rtol=1e-6)
    smoothed = preference_loss(ratios, 0.3, 0.2, "sigmoid")
    expected = [-0.8 * math.log(sigmoid(0.3 * h)) - 0.2 * math.log(sigmoid(-0.3 * h)) for h in (2.0, -3.0, 0.0)]
    np.testing.assert_allclose(smoothed, expected, rtol=1e-6)
    # IPO: (h - 1 / (2 beta))^2.
    np.testing.assert_allclose(preference_loss(ratios, 0.25, 0.0, "ipo"), [0.0, 25.0, 4.0], atol=1e-6)


def test_figures_of_a_batch_by_hand() -> None:
    policy, reference = jnp.array([[-3.0, -8.0], [-4.0, -2.0]]), jnp.array([[-5.0, -7.0], [-3.0, -4.0]])
    total, (pairs, metrics) = preference_sums(policy, reference, 0.5, 0.0, "sigmoid")
    # Ratios (2, -1) and (-1, 2): h = 3 and -3.
    assert float(total) == pytest.approx(-math.log(sigmoid(1.5)) - math.log(sigmoid(-1.5)))
    assert float(pairs) == 2.0
    means = {name: float(value / number) for name, (value, number) in metrics.items()}
    assert means == pytest.approx({"accuracy": 0.5, "margin": 0.0, "chosen_reward": 0.25, "rejected_reward": 0.25})


def test_the_gradient_pushes_the_pair_apart_most_where_it_is_ranked_wrong() -> None:
    def loss(policy: jax.Array) -> jax.Array:
        return preference_sums(policy, jnp.zeros((2, 2)), 0.7, 0.0, "sigmoid")[0]

    gradient = jax.grad(loss)(jnp.array([[2.0, -1.0], [-1.0, 2.0]]))
    # -beta sigmoid(-beta h) for the preferred one, and its opposite (Rafailov et al. 2023, below eq. 7).
    weights = [0.7 * sigmoid(-0.7 * 3.0), 0.7 * sigmoid(0.7 * 3.0)]
    np.testing.assert_allclose(gradient, [[-weights[0], weights[0]], [-weights[1], weights[1]]], rtol=1e-6)


def test_the_loss_is_finite_at_any_ratio() -> None:
    ratios = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    found = preference_loss(ratios, 0.5, 0.1, "sigmoid")
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, [1e3, 9e3], rtol=1e-6)
