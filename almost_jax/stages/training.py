"""The loop that SFT and both reward models share: steps, progress, metrics, checkpoints, exact resume."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from almost_jax.config import ExperimentConfig, OptimizerConfig, PpoConfig, TrainingConfig
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.partitioning import batch_sharding, global_array, replicated, row_parts
from almost_jax.core.train import Batch, LossSums, TrainState, learning_rate_schedule, make_optimizer, make_train_step
from almost_jax.errors import InputError
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.metrics import MetricsLogger
from almost_jax.io.preemption import Preempted, asked_to_stop, saves_first
from almost_jax.io.run import Run
from almost_jax.sampling.padding import bucket_length
from almost_jax.stages.execution import placed_for_training, training_spread
from almost_jax.stages.guards import Guard, figures_of, non_finite

State = TypeVar("State")
HostBatch: TypeAlias = Mapping[str, np.ndarray]

# Rows that come in buckets of like length are padded to a multiple of this many tokens; where a whole data set has one
# length, to a finer one, since only one program is compiled.
LENGTH_MULTIPLE = 16
FIXED_MULTIPLE = 8
# The key, in a checkpoint's JSON, of the last step in metrics.jsonl.
LOGGED = "logged"


def fresh_state(params: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """A state at step 0 that owns its memory: float32 copies of the parameters, so that steps may donate the state.

    Args:
        params: the tree to start from, placed on the mesh.
        optimizer: its moments take the parameters' shardings; its counters are replicated.
        mesh: where the state lives.
    """
    whole = replicated(mesh)

    def place(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, whole) if leaf.ndim == 0 else leaf

    own = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return TrainState(place(jnp.zeros((), jnp.int32)), own, jax.tree.map(place, optimizer.init(own)))


def place_batch(batch: HostBatch, mesh: jax.sharding.Mesh) -> Batch:
    """Put a batch of NumPy arrays [B, ...] on the mesh, rows split over data and fsdp; every host puts its own rows.

    Raises:
        InputError: B can't be split evenly.
    """
    _check_rows(next(iter(batch.values())).shape[0], mesh)
    sharding = batch_sharding(mesh)
    return {name: global_array(array, sharding) for name, array in batch.items()}


def place_batches(batches: Sequence[HostBatch], mesh: jax.sharding.Mesh) -> Batch:
    """Put batches of the same shapes on the mesh, stacked to arrays [K, B, ...]; see `place_batch`."""
    _check_rows(next(iter(batches[0].values())).shape[0], mesh)
    sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))
    return {name: global_array(np.stack([batch[name] for batch in batches]), sharding) for name in batches[0]}


def _check_rows(rows: int, mesh: jax.sharding.Mesh) -> None:
    split = row_parts(mesh)
    if rows % split:
        raise InputError(f"batch_size: {rows} rows can't be split over {split} devices (data x fsdp); use a multiple")


def check_batches(config: ExperimentConfig, mesh: jax.sharding.Mesh, stages: Collection[str]) -> None:
    """Refuse batches that the mesh can't split, before any of the stages has begun.

    With `mesh.explicit` every device splits its own rows into micro-batches; else the compiler splits each.

    Args:
        config: the experiment.
        mesh: what the stages train on.
        stages: the names of those that will run.

    Raises:
        InputError: names the key, the rows and what they must be a multiple of.
    """
    parts = row_parts(mesh)
    for key, settings, whole in _trainings(config, stages):
        if settings.batch_size % parts:
            raise InputError(
                f"{key}.batch_size: {settings.batch_size} rows can't be split over {parts} devices; use a multiple"
            )
        rows, micro_batches, what = settings.batch_size, settings.micro_batches, "rows"
        if isinstance(settings, PpoConfig):
            rows, what = rows // settings.num_mini_batches, "rows of a mini-batch"
        if config.mesh.explicit and whole and rows % (parts * micro_batches):
            raise InputError(
                f"{key}.micro_batches: {rows} {what} must be a multiple of devices x micro_batches = "
                f"{parts} x {micro_batches} with mesh.explicit"
            )


def _trainings(
    config: ExperimentConfig, stages: Collection[str]
) -> Iterator[tuple[str, TrainingConfig | PpoConfig, bool]]:
    """Every training of these stages that has batches of `batch_size` rows.

    Yields:
        Dotted key, settings, and whether steps have these batches: packed, DPO only scores pairs by them.
    """
    # Packed, there are as many rows as the mesh can split.
    as_is, reward = config.as_is_reward, config.reward
    if "as_is_reward" in stages and as_is.votes != "none" and not as_is.packed_length:
        yield "as_is_reward.training", as_is.training, True
    rewarded = "reward" in stages or ("reward_ablation" in stages and config.reward_ablation is not None)
    if rewarded and not reward.packed_length:
        yield "reward.training", reward.training, True
    if "sft" in stages and not config.sft.packed_length:
        yield "sft.training", config.sft.training, True
    if "dpo" in stages and config.dpo is not None:
        yield "dpo.training", config.dpo.training, not config.dpo.packed_length
    if "rlsf" in stages or ("over_optimisation" in stages and config.over_optimisation is not None):
        yield "ppo", config.ppo, True


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def free(tree: Any) -> None:
    """Give back the memory of a tree's arrays, whoever still holds them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def fresh_or_restored(
    checkpoints: Checkpoints, make: Callable[[], State], around: Callable[[State], Any]
) -> tuple[int, Any, dict[str, Any] | None]:
    """A fresh state, or what the last whole checkpoint holds; never both in memory at once.

    Args:
        checkpoints: the stage's.
        make: makes the fresh state, which has the shardings to restore onto; called again where no checkpoint is whole.
        around: the state's shapes -> the tree that a checkpoint holds.

    Returns:
        (0, state, None), or the checkpoint's (step, tree, extra).

    Raises:
        InputError: every whole checkpoint holds another tree.
    """
    state = make()
    if not checkpoints.steps():
        return 0, state, None
    expected = around(abstract(state))
    free(state)
    found = checkpoints.restore(expected)
    return found or (0, make(), None)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array in a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def count_steps(training: TrainingConfig, examples: int) -> int:
    """Updates in `training.epochs` passes over the examples; the last, incomplete batch is dropped."""
    return max(training.epochs * examples // training.batch_size, 1)


def row_limit(training: TrainingConfig, model: LlamaConfig) -> int:
    """The longest row that is learned from: `max_length`, or the model's positions where those are fewer."""
    return min(training.max_length, model.max_position_embeddings)


def say_of_warmup(run: Run, name: str, optimizer: OptimizerConfig, updates: int) -> None:
    """Say of a warm-up that is as long as the whole run that the learning rate won't get to its peak."""
    if optimizer.warmup_steps >= updates:
        run.say(
            f"{name}: warmup_steps {optimizer.warmup_steps} for {updates} updates: the learning rate ends below "
            f"{optimizer.learning_rate:g}, before it gets there"
        )


def fixed_length(longest: int) -> int:
    """The one length that every row of a data set is padded to, so that one program is compiled."""
    return bucket_length(longest, FIXED_MULTIPLE)


def stop_if_asked(
    asked: bool,
    run: Run,
    name: str,
    step: int,
    state: Any,
    checkpoints: Checkpoints,
    extra: Callable[[], dict[str, Any]],
) -> None:
    """After SIGTERM: save the state of this step, with `extra`, unless that is done already, and end the process.

    `asked` is what `asked_to_stop` has said in this step: once for all of it, so that nothing is done by halves.

    Nothing but the state is written, so records are those of a run that was never stopped.

    Raises:
        Preempted: SIGTERM came.
    """
    if not asked:
        return
    if step not in checkpoints.steps():
        checkpoints.save(step, state, extra())
    # Here, where another signal must be meant to break it off, and not once the loop has ended.
    checkpoints.wait()
    run.say(f"{name}: asked to stop; step {step} is saved, the same command goes on from there")
    raise Preempted


def kept_beside(guard: Guard, metrics: MetricsLogger) -> dict[str, Any]:
    """The JSON of a checkpoint; what was logged before it is on the disk before it."""
    return {**guard.extra, LOGGED: metrics.sync()}


def checkpoint_folder(run: Run, name: str) -> Path:
    """Where a stage keeps its training state."""
    return run.path(name) / "checkpoints"


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The programs that make steps: one at a time, and `length` of them where as many of one shape are due.

    Which steps come together depends on their numbers alone, so that a resumed run makes the calls of one that never
    stopped.
    """

    make: Callable[..., Any]
    length: int
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def one(self) -> Any:
        return self.make()

    @functools.cached_property
    def several(self) -> Any:
        return self.make(several=True)

    def end(self, done: int, total_steps: int) -> int:
        """The last step of the call behind `done` steps."""
        return min((done // self.length + 1) * self.length, total_steps)

    def __call__(self, state: TrainState, batches: Sequence[HostBatch]) -> tuple[TrainState, Any]:
        """The state after a step of each batch, and their figures on the device, for `figures_of`."""
        shapes = [{name: array.shape for name, array in batch.items()} for batch in batches]
        if 1 < len(batches) == self.length and all(shape == shapes[0] for shape in shapes):
            return self.several(state, place_batches(batches, self.mesh))
        found = []
        for batch in batches:
            state, figures = self.one(state, place_batch(batch, self.mesh))
            found.append(figures)
        return state, found


def fit(
    run: Run,
    name: str,
    params: Params,
    config: LlamaConfig,
    loss_sums: LossSums,
    batch_at: Callable[[int], HostBatch],
    total_steps: int,
    training: TrainingConfig,
    evaluate: Callable[[Params], dict[str, float]] | None,
) -> TrainState:
    """Train to `total_steps`, going on from the last checkpoint if there is one.

    State, metrics and the order of batches after a stop and a resume are those of a run that never stopped: a batch is
    a function of its step, the checkpoint holds the optimizer too, and metrics behind it are written anew.

    Args:
        run: the run; metrics go to NAME/metrics.jsonl, states to NAME/checkpoints.
        name: the stage.
        params: the tree to start from, on the run's mesh; its memory is given up for the state's.
        config: the shape of the model that it belongs to.
        loss_sums: what a step makes smaller.
        batch_at: number of updates done -> the next batch, arrays [B, ...].
        total_steps: updates in all.
        training: the optimizer, micro-batches, guards, and when to log and to save.
        evaluate: parameters -> figures, called whenever a checkpoint is saved and logged with it.

    Returns:
        The state after `total_steps` updates.

    Raises:
        TrainingDiverged: a figure is not finite, and `training.guards` says to stop.
        InputError: the batch can't be split over the mesh, or the checkpoint has other shapes.
        Preempted: SIGTERM came; the state is saved.
    """
    say_of_warmup(run, name, training.optimizer, total_steps)
    schedule = learning_rate_schedule(training.optimizer, total_steps)
    optimizer = make_optimizer(training.optimizer, total_steps)
    settings, mesh, action = run.config.mesh, run.mesh, training.guards.non_finite

    def fresh() -> TrainState:
        return fresh_state(placed_for_training(params, config, settings, mesh), optimizer, mesh)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(checkpoint_folder(run, name), keep=training.max_to_keep)
        stack.callback(checkpoints.close)
        start, state, found = fresh_or_restored(checkpoints, fresh, lambda state: state)
        free(params)
        extra = found or {}
        placement = shardings_of(state)
        make = functools.partial(
            make_train_step,
            loss_sums,
            optimizer,
            training.micro_batches,
            placement,
            training_spread(settings, mesh, placement.params),
            action == "skip",
        )
        calls = _Calls(make, training.steps_per_call, mesh)
        guard = Guard(run, name, checkpoints, training.guards.max_skips, extra)
        metrics = run.metrics(name, start, extra.get(LOGGED))
        stack.callback(metrics.close)
        progress = stack.enter_context(run.progress(name, total_steps, start))
        stack.enter_context(saves_first())
        done = start
        while done < total_steps:
            before, done = done, calls.end(done, total_steps)
            state, on_device = calls(state, [batch_at(number) for number in range(before, done)])
            saves = done % training.checkpoint_every == 0 or done == total_steps
            # An unlogged step's figures are looked at too before its state is saved as one to go on from, and where
            # skipped steps are counted; else the host needn't wait for them.
            looks = saves or action == "skip" or done // training.log_every > before // training.log_every
            figures = figures_of(on_device) if looks else []
            asked = asked_to_stop()
            if asked and not figures:
                figures = figures_of(on_device)
            # A skipped step leaves the optimizer's count, and so its place in the schedule, as it was.
            made = [not own.get("skipped") for own in figures]
            for step, own in enumerate(figures, start=before + 1):
                guard.skips(step, non_finite(own, action))
                ends = saves and step == done
                if ends or step % training.log_every == 0:
                    updates = int(state.step) - sum(made[step - before - 1 :])
                    own["learning_rate"] = float(schedule(updates))
                    if ends and evaluate is not None:
                        own |= evaluate(state.params)
                        # It may have taken long.
                        asked = asked_to_stop() or asked
                    metrics.log(step, own)
            if saves:
                checkpoints.save(done, state, kept_beside(guard, metrics))
            progress.advance(done - before, **({"loss": figures[-1]["loss"]} if looks else {}))
            stop_if_asked(asked, run, name, done, state, checkpoints, lambda: kept_beside(guard, metrics))
        checkpoints.wait()
        guard.say_what_was_skipped(total_steps)
    return state
