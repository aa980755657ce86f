"""PPO's updates: policy and critic, their optimizers, and the KL coefficient between steps.

Source: Schulman et al. 2017 (PPO); Ziegler et al. 2019 (the KL controller).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from almost_jax.config import PpoConfig
from almost_jax.core.llama import Params
from almost_jax.core.losses import LossTerms, length_mask
from almost_jax.core.partitioning import platform, training_options
from almost_jax.core.rl import kl_loss, policy_loss, ppo_loss, update_kl_coef, value_loss
from almost_jax.core.train import (
    Spread,
    TrainState,
    accumulate_gradients,
    apply_gradients,
    learning_rate_schedule,
    make_optimizer,
    unless,
)
from almost_jax.sampling.layout import decode_layout
from almost_jax.stages.rollouts import Experience, Players, response_logprobs, response_values

Update: TypeAlias = Callable[["PpoState", Experience, Array | np.ndarray], tuple["PpoState", dict[str, Array]]]


@struct.dataclass
class PpoState:
    """What a step reads and writes: policy and critic with their optimizers, and the KL coefficient, float32 scalar."""

    policy: TrainState
    critic: TrainState
    kl_coef: Array


def make_update(
    players: Players,
    ppo: PpoConfig,
    policy_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    trains_policy: bool,
    state_shardings: Any,
    spread: Spread | None = None,
) -> Update:
    """A jitted update (state, experience, rows [M] int32 of the mini-batch) -> (state, figures); donates the state.

    Without `trains_policy` only the critic is updated (`ppo.critic_warmup_steps`). The new state lies as
    `state_shardings` say, which are the old one's, so that nothing is compiled twice. `spread`: see
    `core.train.accumulate_gradients`.

    Where `ppo.guards.non_finite` is `skip`, the figure `skipped` says whether a loss or gradient was not finite; with
    `ppo.early_stop_kl`, the figure `too_far` whether the policy was further than that from the one that sampled. In
    both cases the new state is the old one.
    """
    skips, limit = ppo.guards.non_finite == "skip", ppo.early_stop_kl

    def update(state: PpoState, learned: Experience, rows: Array) -> tuple[PpoState, dict[str, Array]]:
        fields = {field.name: getattr(learned, field.name) for field in dataclasses.fields(learned)}
        batch = {name: array[rows] for name, array in fields.items() if array is not None}
        # A row's own copy, so that it goes wherever the row goes.
        batch["kl_coef"] = jnp.broadcast_to(state.kl_coef, rows.shape)
        params = {"policy": state.policy.params, "critic": state.critic.params}

        def loss_sums(params: Params, part: dict[str, Array]) -> LossTerms:
            return ppo_loss_sums(params, part, players, ppo)

        grads, figures = accumulate_gradients(loss_sums, params, batch, ppo.micro_batches, spread)
        figures["critic_grad_norm"] = optax.tree.norm(grads["critic"])
        critic = apply_gradients(state.critic, grads["critic"], critic_optimizer)
        policy = state.policy
        if trains_policy:
            figures["policy_grad_norm"] = optax.tree.norm(grads["policy"])
            policy = apply_gradients(policy, grads["policy"], policy_optimizer)
        new, sound = PpoState(policy, critic, state.kl_coef), jnp.ones((), bool)
        if skips:
            watched = [figures[name] for name in ("loss", "critic_grad_norm", "policy_grad_norm") if name in figures]
            finite = jnp.isfinite(jnp.stack(watched)).all()
            figures["skipped"], sound = (~finite).astype(jnp.float32), sound & finite
        if limit:
            near = ~(figures["approx_kl"] > limit)
            figures["too_far"], sound = (~near).astype(jnp.float32), sound & near
        return unless(sound, new, state) if skips or limit else new, figures

    places = (state_shardings, None)
    return jax.jit(update, donate_argnums=0, out_shardings=places, compiler_options=training_options())


def ppo_loss_sums(params: Params, batch: dict[str, Array], players: Players, ppo: PpoConfig) -> LossTerms:
    """PPO's loss over a micro-batch.

    Args:
        params: {"policy": tree, "critic": tree with a head}.
        batch: the fields of `Experience` by name, and `kl_coef`, the coefficient once for each row.
        players: the models' shapes.
        ppo: clip ranges and weights of the terms.

    Returns:
        Sum of losses, number of unmasked tokens, metrics.
    """
    policy, policy_config = decode_layout(params["policy"], players.policy, platform())
    critic, critic_config = decode_layout(params["critic"], players.critic, platform())
    players = dataclasses.replace(players, policy=policy_config, critic=critic_config)
    tokens, starts, responses = batch["tokens"], batch["prompt_lengths"], batch["responses"]
    mask = length_mask(batch["lengths"], responses.shape[1])
    logprobs, entropies = response_logprobs(policy, players.policy, tokens, starts, responses, players.temperature)
    values = response_values(critic, players, tokens, starts, responses.shape[1])
    average, old = ppo.loss_average, batch["old_logprobs"]
    policy_terms = policy_loss(logprobs, old, batch["advantages"], mask, ppo.cliprange, ppo.dual_clip, average)
    value_terms = value_loss(values, batch["old_values"], batch["returns"], mask, ppo.cliprange_value, average)
    total, (weight, metrics) = ppo_loss(
        policy_terms, value_terms, entropies, mask, ppo.vf_coef, ppo.entropy_coef, average
    )
    if ppo.kl_in == "loss" and "reference_logprobs" in batch:
        kl, (_, more) = kl_loss(logprobs, old, batch["reference_logprobs"], mask, ppo.kl_estimator, average)
        total, metrics = total + batch["kl_coef"][0] * kl, {**metrics, **more}
    return total, (weight, metrics)


def mean_figures(every: Sequence[Mapping[str, float]], ppo: PpoConfig) -> dict[str, float]:
    """A step's figures from those of its updates: means over the ones that were applied, over all when none was.

    With `ppo.early_stop_kl` also `early_stopped` (1 or 0) and `updates`, how many were applied.

    Args:
        every: the figures of each update, on the host.
        ppo: the config.
    """
    ways = ("skipped", "too_far")
    applied = [figures for figures in every if not any(figures.get(way) for way in ways)]
    counted = applied or list(every)
    found = {
        name: float(np.mean([figures[name] for figures in counted])) for name in every[0] if name not in ways
    }
    if ppo.early_stop_kl:
        found |= {"early_stopped": float(bool(every[-1]["too_far"])), "updates": float(len(applied))}
    return found


def make_optimizers(ppo: PpoConfig) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Policy's and critic's optimizer: the same but for the learning rate and the policy's later start."""
    critic = ppo.optimizer.model_copy(update={"learning_rate": ppo.value_learning_rate})
    return (
        make_optimizer(ppo.optimizer, policy_updates(ppo)),
        make_optimizer(critic, ppo.steps * ppo.num_ppo_epochs * ppo.num_mini_batches),
    )


def policy_updates(ppo: PpoConfig) -> int:
    """The policy's updates in all steps: none while the critic learns alone."""
    return max(ppo.steps - ppo.critic_warmup_steps, 1) * ppo.num_ppo_epochs * ppo.num_mini_batches


def policy_learning_rate(ppo: PpoConfig, step: int, updates: int) -> float:
    """The policy's learning rate at the first update of a step.

    Args:
        ppo: the config.
        step: counted from 1; the rate is 0 while only the critic is trained.
        updates: of the policy before this step.
    """
    if step <= ppo.critic_warmup_steps:
        return 0.0
    per_step = ppo.num_ppo_epochs * ppo.num_mini_batches
    schedule = learning_rate_schedule(ppo.optimizer, max(ppo.steps - ppo.critic_warmup_steps, 1) * per_step)
    return float(schedule(updates))


def next_kl_coef(kl_coef: Array, observed: float, ppo: PpoConfig) -> Array:
    """The KL coefficient of the next step: the same, or the adaptive controller's."""
    if ppo.kl_controller == "fixed":
        return kl_coef
    return jax.device_put(
        update_kl_coef(kl_coef, observed, ppo.kl_target, ppo.kl_horizon, ppo.batch_size), kl_coef.sharding
    )
