"""Direct preference optimisation: losses on the log-probs that a policy and its reference give two responses.

Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; label smoothing after Mitchell 2023 (cDPO); IPO
after Azar et al. 2023, eq. 17.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from almost_jax.core.losses import LossTerms, pair_terms, pairwise_accuracy

Objective: TypeAlias = Literal["sigmoid", "ipo"]


def preference_loss(ratios: Array, beta: float, label_smoothing: float, objective: Objective) -> Array:
    """The loss of each pair.

    With h = log(pi(w) / ref(w)) - log(pi(l) / ref(l)) of the preferred response w and the other one l:
    "sigmoid" is -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e being `label_smoothing`, the share of labels
    that are taken to be wrong; "ipo" is (h - 1 / (2 beta))^2.

    Args:
        ratios: [..., 2] float32, log pi - log ref of the preferred response and of the other one.
        beta: how strongly the policy is held to the reference; in nats^-1.
        label_smoothing: 0 is the paper's loss; for "sigmoid" alone.
        objective: which of the two.

    Returns:
        [...] float32. Where policy and reference agree, "sigmoid" gives log 2 whatever beta and smoothing.
    """
    difference = (ratios[..., 0] - ratios[..., 1]).astype(jnp.float32)
    if objective == "ipo":
        return jnp.square(difference - 0.5 / beta)
    scaled = beta * difference
    return (1.0 - label_smoothing) * jax.nn.softplus(-scaled) + label_smoothing * jax.nn.softplus(scaled)


def preference_sums(
    policy: Array,
    reference: Array,
    beta: float,
    label_smoothing: float,
    objective: Objective,
    present: Array | None = None,
) -> LossTerms:
    """`preference_loss` of a batch of pairs.

    Args:
        policy, reference: [..., 2] log-probs of the preferred response and of the other one.
        beta, label_smoothing, objective: see `preference_loss`.
        present: [...] bool, where there is a pair; None: everywhere.

    Returns:
        Sum of losses, number of pairs, and the metrics `accuracy` (the preferred response has the higher implicit
        reward beta (log pi - log ref); a tie counts one half), `margin` (difference of implicit rewards),
        `chosen_reward` and `rejected_reward`.
    """
    ratios = policy.astype(jnp.float32) - reference.astype(jnp.float32)
    metrics = {
        "accuracy": pairwise_accuracy(ratios[..., 0], ratios[..., 1]),
        "margin": beta * (ratios[..., 0] - ratios[..., 1]),
        "chosen_reward": beta * ratios[..., 0],
        "rejected_reward": beta * ratios[..., 1],
    }
    return pair_terms(preference_loss(ratios, beta, label_smoothing, objective), metrics, present)
