"""The mathematics of PPO on text: KL penalties, shaped rewards, advantages, clipped losses, the KL controller.

Arrays over a response are [B, T], indexed from its first token; `mask` is bool, True at the response's tokens (the stop
token included), and rows fill it from the left. Rewards, values and losses are float32.

The order within a PPO step: `clip_scores`, `penalize_missing_end`, `kl_estimates`, `shaped_rewards`, whitening of
rewards, `gae`, whitening of advantages (both over the whole batch, `almost_jax.core.losses.whiten`); then, per
mini-batch, `policy_loss`, `value_loss`, `kl_loss` where the penalty is in the loss, and `ppo_loss`; after them
`update_kl_coef`.

Losses are averaged over ragged rows in one of three ways (`averaged`), always as a sum and a weight, so that micro-
batches add up.
"""

import jax
import jax.numpy as jnp
from jax import Array

from almost_jax.core.losses import LossTerms, count, masked_sum


def ended(tokens: Array, lengths: Array, stop_tokens: tuple[int, ...]) -> Array:
    """Whether a response's last token is a stop token.

    Looks at the response alone, so a stop token in the prompt or in the padding doesn't count.

    Args:
        tokens: [B, T] int32, response tokens.
        lengths: [B] int32 in 0..T, the stop token included.
        stop_tokens: the configured ones.

    Returns:
        [B] bool, False for an empty response.
    """
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    stops = jnp.asarray(stop_tokens, dtype=tokens.dtype)
    return (lengths > 0) & (last[:, None] == stops[None, :]).any(axis=1)


def clip_scores(scores: Array, reward_clip: float) -> Array:
    """Clip sequence scores [B] to +-reward_clip, float32, so that an odd score can't rule the batch."""
    return jnp.clip(scores.astype(jnp.float32), -reward_clip, reward_clip)


def penalize_missing_end(scores: Array, has_ended: Array, penalty: float) -> Array:
    """Subtract `penalty` from the score of every response that did not end by a stop token.

    After the clip, so that the clip can't take it back. Source: "EOS trick" of Huang et al., "The N Implementation
    Details of RLHF with PPO", 2023; TRL's `missing_eos_penalty`, which also subtracts.

    Args:
        scores: [B].
        has_ended: [B] bool, from `ended`.
        penalty: >= 0.

    Returns:
        [B] float32.
    """
    wide = scores.astype(jnp.float32)
    return jnp.where(has_ended, wide, wide - penalty)


def kl_estimates(logprobs: Array, reference_logprobs: Array, kind: str) -> Array:
    """Per-token estimates of KL(policy || reference) from tokens that the policy drew.

    With d = log p - log q (Schulman, "Approximating KL Divergence", 2020): k1 = d, unbiased, may be negative and is not
    clamped; k2 = d^2 / 2, biased, never negative; k3 = exp(-d) - 1 + d, unbiased, never negative.

    Args:
        logprobs: [B, T] of the policy p, at the sampling temperature.
        reference_logprobs: [B, T] of the reference q, at the same temperature.
        kind: "k1", "k2" or "k3".

    Returns:
        [B, T] float32; what lies at padding is meaningless.

    Raises:
        ValueError: `kind` is none of these.
    """
    difference = logprobs.astype(jnp.float32) - reference_logprobs.astype(jnp.float32)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kl_estimator {kind!r} is unknown; known: k1, k2, k3")


def sequence_kl(kl: Array, mask: Array) -> Array:
    """Per-token estimates summed over each response: [B, T] -> [B] float32; its mean is what the controller watches."""
    return jnp.sum(kl.astype(jnp.float32), axis=1, where=mask)


def shaped_rewards(scores: Array, kl: Array, mask: Array, kl_coef: Array | float) -> Array:
    """Per-token rewards: -kl_coef KL_t at every token, and the score on top at each row's last one.

    Source: Ziegler et al. 2019, eq. 2, R(x, y) = r(x, y) - beta log(pi(y|x) / rho(y|x)), spread over the tokens.

    Args:
        scores: [B] sequence scores.
        kl: [B, T] from `kl_estimates`.
        mask: [B, T] bool. An empty row gets no reward anywhere.
        kl_coef: beta, scalar.

    Returns:
        [B, T] float32, 0 where `mask` is False. A row's sum is score - kl_coef x its summed KL.
    """
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    last = jnp.arange(mask.shape[1])[None, :] == lengths[:, None] - 1
    penalty = -jnp.float32(kl_coef) * jnp.where(mask, kl.astype(jnp.float32), 0.0)
    return penalty + jnp.where(last, scores.astype(jnp.float32)[:, None], 0.0)


def gae(rewards: Array, values: Array, mask: Array, gamma: float, gae_lambda: float) -> tuple[Array, Array]:
    """Generalized advantage estimation on ragged rows.

    A_t = sum over l of (gamma lambda)^l delta_(t+l), with delta_t = r_t + gamma V_(t+1) - V_t, and V = 0 after a row's
    last token (Schulman et al. 2016, eq. 16).

    Args:
        rewards: [B, T].
        values: [B, T], V_t before token t was drawn.
        mask: [B, T] bool.
        gamma, gae_lambda: discount and trace decay, each in 0..1.

    Returns:
        Advantages and returns (advantage + value), [B, T] float32 without gradient, 0 where `mask` is False.
    """
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * following - values

    def back(advantage: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * gae_lambda * advantage
        return advantage, advantage

    # Behind a row's end every delta is 0, so the trace arrives at its last token empty.
    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jax.lax.stop_gradient(advantages.T)
    return advantages, advantages + jax.lax.stop_gradient(values)


def averaged(losses: Array, mask: Array, average: str) -> tuple[Array, Array]:
    """Losses of tokens as a sum and the weight to divide it by, of which micro-batches add up.

    "token_mean": every token weighs the same, so long responses weigh more (Ouyang et al. 2022; TRL's PPO).
    "sequence_mean": the mean over responses of each one's mean (DeepSeekMath's GRPO, Shao et al. 2024, eq. 3).
    "fixed_length": the sum over tokens divided by responses x T, a constant, so that a token's gradient doesn't depend
    on the length of its response or its neighbours' (Dr. GRPO, Liu et al. 2025).

    Args:
        losses: [B, T]; what lies at padding is not read.
        mask: [B, T] bool; T is the longest that a response may be.
        average: one of the three.

    Returns:
        Sum and weight, float32 scalars.

    Raises:
        ValueError: `average` is none of these.
    """
    if average == "token_mean":
        return masked_sum(losses, mask), count(mask)
    if average == "sequence_mean":
        lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
        sums = jnp.sum(losses.astype(jnp.float32), axis=1, where=mask)
        return jnp.sum(sums / jnp.maximum(lengths, 1.0)), count(lengths > 0)
    if average == "fixed_length":
        return masked_sum(losses, mask), jnp.float32(mask.shape[0] * mask.shape[1])
    raise ValueError(f"loss_average {average!r} is unknown; known: token_mean, sequence_mean, fixed_length")


def policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    cliprange: float,
    dual_clip: float,
    average: str,
) -> LossTerms:
    """Clipped surrogate: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) with ratio = p / p_old.

    With a dual clip c, a negative advantage's loss is at most c |A|, however large the ratio. Source: Schulman et al.
    2017 (PPO), eq. 7, negated so that it is minimised; Ye et al. 2020 (dual clip), eq. 5.

    Args:
        logprobs: [B, T] of the policy being trained, at the sampling temperature.
        old_logprobs: [B, T] of the policy that drew the tokens.
        advantages: [B, T], constants.
        mask: [B, T] bool.
        cliprange: eps.
        dual_clip: c > 1, or 0 for none.
        average: see `averaged`.

    Returns:
        Sum of losses and their weight, and metrics: `policy_loss`, and means over unmasked tokens of `ratio`,
        `clip_fraction` (share of tokens whose clipped term is the larger loss, so that they get no gradient),
        `dual_clip_fraction` with a dual clip, and `approx_kl` (k3 of the old policy against the new one).
    """
    log_ratio = jnp.where(mask, logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32), 0.0)
    ratio = jnp.exp(log_ratio)
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages.astype(jnp.float32), 0.0))
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - cliprange, 1.0 + cliprange)
    losses = jnp.maximum(unclipped, clipped)
    metrics = {
        "ratio": masked_sum(ratio, mask),
        "clip_fraction": masked_sum(clipped > unclipped, mask),
        "approx_kl": masked_sum(jnp.expm1(log_ratio) - log_ratio, mask),
    }
    if dual_clip:
        bound = -dual_clip * advantages
        bounded = (advantages < 0) & (losses > bound)
        losses = jnp.where(bounded, bound, losses)
        metrics["dual_clip_fraction"] = masked_sum(bounded, mask)
    total, weight = averaged(losses, mask, average)
    return total, (weight, {**_over(weight, {"policy_loss": total}), **_over(count(mask), metrics)})


def value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, cliprange_value: float, average: str
) -> LossTerms:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), clipped around the rollout's values.

    Source: OpenAI baselines' PPO2, described in Huang et al., "The 37 Implementation Details of PPO", 2022, detail 9,
    and used by Ziegler et al. 2019.

    Args:
        values: [B, T] of the critic being trained.
        old_values: [B, T] of the critic at rollout, constants.
        returns: [B, T] from `gae`, constants.
        mask: [B, T] bool.
        cliprange_value: eps; 0 leaves the squared error unclipped.
        average: see `averaged`.

    Returns:
        Sum of losses and their weight, and metrics: `value_loss`, and means over unmasked tokens of `value` and
        `value_clip_fraction` (share of tokens whose clipped error is the larger one).
    """
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    old = jax.lax.stop_gradient(jnp.where(mask, old_values.astype(jnp.float32), 0.0))
    targets = jax.lax.stop_gradient(jnp.where(mask, returns.astype(jnp.float32), 0.0))
    unclipped = jnp.square(values - targets)
    clipped = unclipped
    if cliprange_value:
        clipped = jnp.square(jnp.clip(values, old - cliprange_value, old + cliprange_value) - targets)
    total, weight = averaged(0.5 * jnp.maximum(unclipped, clipped), mask, average)
    metrics = {"value": masked_sum(values, mask), "value_clip_fraction": masked_sum(clipped > unclipped, mask)}
    return total, (weight, {**_over(weight, {"value_loss": total}), **_over(count(mask), metrics)})


def kl_loss(
    logprobs: Array, old_logprobs: Array, reference_logprobs: Array, mask: Array, kind: str, average: str
) -> LossTerms:
    """KL(policy || reference) as a term of the loss, with an unbiased gradient at every update of a step.

    An estimator whose value is right need not have the right gradient: under the expectation, differentiating k1 as it
    stands gives 0, and k3 gives the gradient of KL(reference || policy) (Tang and Munos 2025). Tokens were drawn by the
    old policy, so each estimate is weighted by ratio = p / p_old, and for k1 and k3 the gradient goes through the ratio
    too, which makes value and gradient those of the KL. k2's own gradient is right already (d grad log p), so its
    weight is a constant; its value is biased. As in the surrogate, prefixes are those of the old policy.

    Args:
        logprobs: [B, T] of the policy being trained, at the sampling temperature.
        old_logprobs: [B, T] of the policy that drew the tokens.
        reference_logprobs: [B, T] of the reference.
        mask: [B, T] bool.
        kind: "k1", "k2" or "k3", see `kl_estimates`.
        average: see `averaged`.

    Returns:
        Sum of estimates and their weight, and the metric `kl_loss`.
    """
    def real(x: Array) -> Array:
        return jnp.where(mask, x.astype(jnp.float32), 0.0)

    logprobs = real(logprobs)
    estimates = kl_estimates(logprobs, jax.lax.stop_gradient(real(reference_logprobs)), kind)
    ratio = jnp.exp(logprobs - jax.lax.stop_gradient(real(old_logprobs)))
    if kind == "k2":
        ratio = jax.lax.stop_gradient(ratio)
    total, weight = averaged(ratio * estimates, mask, average)
    return total, (weight, _over(weight, {"kl_loss": total}))


def ppo_loss(
    policy: LossTerms,
    value: LossTerms,
    entropies: Array,
    mask: Array,
    vf_coef: float,
    entropy_coef: float,
    average: str,
) -> LossTerms:
    """Policy loss + vf_coef x value loss - entropy_coef x entropy (Schulman et al. 2017, eq. 9, negated).

    Args:
        policy: from `policy_loss`.
        value: from `value_loss`, over the same mask.
        entropies: [B, T] of the policy, in nats.
        mask: [B, T] bool.
        vf_coef, entropy_coef: >= 0.
        average: see `averaged`; the same as that of the other two.

    Returns:
        The sum and its weight, the metrics of both parts, and `entropy`, the mean over unmasked tokens.
    """
    total = policy[0] + vf_coef * value[0]
    if entropy_coef:
        total = total - entropy_coef * averaged(entropies, mask, average)[0]
    mean = _over(count(mask), {"entropy": masked_sum(entropies, mask)})
    return total, (policy[1][0], {**policy[1][1], **value[1][1], **mean})


def update_kl_coef(
    kl_coef: Array | float, observed: Array | float, target: float, horizon: int, batch_size: int
) -> Array:
    """The adaptive controller: beta <- beta (1 + e batch_size / horizon), e = clip(KL / target - 1, -0.2, 0.2).

    Source: Ziegler et al. 2019, section 2.2, with the step size batch_size / horizon of their code. A fixed controller
    is one that doesn't call this. The coefficient is all the state there is: saved as float32 it resumes exactly.

    Args:
        kl_coef: beta of the step that made the observation.
        observed: mean over responses of the sequence-summed KL (`sequence_kl`) in nats; may be negative.
        target: the wanted value of it.
        horizon: in episodes.
        batch_size: episodes of this step.

    Returns:
        The next beta, float32 scalar.
    """
    error = jnp.clip(jnp.float32(observed) / target - 1.0, -0.2, 0.2)
    return jnp.float32(kl_coef) * (1.0 + error * (batch_size / horizon))


def _over(tokens: Array, sums: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    return {name: (jax.lax.stop_gradient(total), tokens) for name, total in sums.items()}
