"""Train state, optimizer, gradient accumulation and the step that every supervised stage and PPO share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from almost_jax.config import OptimizerConfig
from almost_jax.core.heads import HEAD
from almost_jax.core.llama import Params
from almost_jax.core.partitioning import training_options

Batch: TypeAlias = dict[str, Array]
# (params, batch) -> (sums, gradients), made to run on every device's own rows.
Spread: TypeAlias = Callable[[Callable[[Params, Any], Any]], Callable[[Params, Any], Any]]
# params, micro-batch -> (sum of losses, (sum of weights, {metric: (sum, sum of weights)}))
LossSums: TypeAlias = Callable[[Params, Batch], tuple[Array, tuple[Array, dict[str, tuple[Array, Array]]]]]


@struct.dataclass
class TrainState:
    """What a training step reads and writes: `step` int32 scalar, the parameters, the optimizer's state."""

    step: Array
    params: Params
    opt_state: Any


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, linear or cosine decay to `final_fraction` of the peak at `total_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(total_steps - warmup, 1)
    after: optax.Schedule
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final_fraction, rest)
    else:
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def is_matrix(path: Any) -> bool:
    """Whether the parameter at a path of the tree is a matrix or a table, not a norm's scale or the scalar head.

    By name, not by rank: the stacked scales of scanned layers are of rank 2 too, and the head is a "kernel" too.
    """
    names = [entry.key for entry in path]
    return names[-1] in ("kernel", "embedding") and HEAD not in names


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (decay on matrices only, not on norm scales or the scalar head) behind global-norm clipping."""

    def decayed(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def accumulate_gradients(
    loss_sums: LossSums, params: Params, batch: Batch, micro_batches: int, spread: Spread | None = None
) -> tuple[Params, dict[str, Array]]:
    """The gradient of the batch's mean loss, computed over `micro_batches` parts.

    Sums of losses, weights and gradients are added over the parts and divided once by the batch's whole weight, so
    ragged rows weigh the same however the batch is split.

    Args:
        loss_sums: see `LossSums`; weights must not depend on the parameters.
        params: the tree to differentiate.
        batch: arrays [B, ...] with B divisible by `micro_batches`.
        micro_batches: the number of parts; with `spread`, of every device's own rows.
        spread: runs the sums on every device's own rows and adds up (explicit FSDP, `core.gathering`); the compiler
            splits the work when None.

    Returns:
        Gradients in float32, and {"loss": ..., and every metric: its sum over its weight}.

    Raises:
        ValueError: B is not divisible by `micro_batches`.
    """
    grad_fn = jax.value_and_grad(loss_sums, has_aux=True)

    def one(params: Params, part: Batch) -> Any:
        (loss, (weight, metrics)), grads = grad_fn(params, part)
        return (loss, weight, metrics), jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def totals(params: Params, batch: Batch) -> Any:
        if micro_batches == 1:
            return one(params, batch)
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % micro_batches:
            raise ValueError(f"a batch of {size} can't be split into {micro_batches} micro-batches of equal size")
        # Micro-batch i takes rows i, i + n, ...: each keeps its share of every device's rows.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(size // micro_batches, micro_batches, *x.shape[1:]), 0, 1), batch
        )
        shapes = jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(params, part)), None), zeros, parts)[0]

    (loss, weight, metrics), grads = (totals if spread is None else spread(totals))(params, batch)
    whole = jnp.maximum(weight, 1e-8)
    grads = jax.tree.map(lambda g: g / whole, grads)
    figures = {name: total / jnp.maximum(count, 1e-8) for name, (total, count) in metrics.items()}
    return grads, {"loss": loss / whole, **figures}


def apply_gradients(state: TrainState, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """One optimizer update."""
    # Optax mixes its int32 step counter with floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def unless(sound: Array, new: Any, old: Any) -> Any:
    """The tree `new` where `sound` (bool scalar), else `old`, a tree like it."""
    return jax.tree.map(lambda left, right: jnp.where(sound, left, right), new, old)


def make_train_step(
    loss_sums: LossSums,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    state_shardings: Any = None,
    spread: Spread | None = None,
    skip_non_finite: bool = False,
    several: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A jitted step (state, batch) -> (state, metrics); the state's memory is donated. Not for use inside another jit.

    Metrics are float32 scalars: those of `accumulate_gradients` and `grad_norm`, before clipping. With
    `state_shardings`, a tree like the state's, the new state lies as the old one did; else the compiler may spell its
    shardings otherwise, and the second step is compiled anew. `spread`: see `accumulate_gradients`. With
    `skip_non_finite` a step whose loss or gradient is not finite leaves the state as it was, and the metric `skipped`
    says so by 1. With `several` batches come stacked, [K, B, ...], and a call makes a step of each, one after the
    other; metrics are [K] then. What memory a step needs beside its state is asked for once a call.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        grads, metrics = accumulate_gradients(loss_sums, state.params, batch, micro_batches, spread)
        metrics["grad_norm"] = optax.tree.norm(grads)
        new = apply_gradients(state, grads, optimizer)
        if skip_non_finite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            metrics["skipped"] = (~finite).astype(jnp.float32)
            new = unless(finite, new, state)
        return new, metrics

    def steps(state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(step, state, batches)

    call = steps if several else step
    if state_shardings is None:
        return jax.jit(call, donate_argnums=0, compiler_options=training_options())
    places = (state_shardings, None)
    return jax.jit(call, donate_argnums=0, out_shardings=places, compiler_options=training_options())
