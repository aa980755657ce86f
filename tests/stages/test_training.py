"""The training loop: exact resume, divergence, batches that don't fit the mesh."""

import contextlib
import gc
import io
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig, TrainingConfig
from almost_jax.core.llama import LlamaConfig
from almost_jax.core.partitioning import replicated
from almost_jax.core.train import Batch, TrainState, make_optimizer, make_train_step
from almost_jax.errors import InputError, TrainingDiverged
from almost_jax.io.batches import batch_indices
from almost_jax.io.checkpoints import Checkpoints, find_damage
from almost_jax.io.preemption import Preempted, stop_between, stops_on_sigterm
from almost_jax.io.run import Run
from almost_jax.stages import training

TRAINING = TrainingConfig.model_validate(
    {
        "optimizer": {"learning_rate": 0.05, "schedule": "cosine", "warmup_steps": 2},
        "batch_size": 6,
        "micro_batches": 2,
        "checkpoint_every": 3,
        "log_every": 2,
    }
)
# Of no importance where the compiler places the parameters.
SHAPE = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
)
POINTS = np.random.default_rng(5).normal(size=(13, 4)).astype(np.float32)
TOTAL = 10


class Stopped(Exception):
    """What a kill looks like from inside."""


def line_sums(params: Any, batch: Batch) -> Any:
    """Least squares, whose loss is NaN when a batch says so."""
    error = batch["x"][:, :3] @ params["kernel"] - batch["x"][:, 3]
    loss = jnp.square(error) + batch["poison"]
    return loss.sum(), (jnp.float32(error.shape[0]), {"error": (jnp.abs(error).sum(), jnp.float32(error.shape[0]))})


def batch_at(step: int) -> dict[str, np.ndarray]:
    rows = batch_indices(step, 6, len(POINTS), 3)
    return {"x": POINTS[rows], "poison": np.zeros((6,), np.float32)}


def fit(
    run: Run, batches: Callable[[int], dict[str, np.ndarray]], evaluate: Any = None, **settings: Any
) -> TrainState:
    params = jax.device_put({"kernel": jnp.ones((3,), jnp.float32)}, replicated(run.mesh))
    programs: list[Any] = []

    def remembered(*arguments: Any, **options: Any) -> Any:
        programs.append(make_train_step(*arguments, **options))
        return programs[-1]

    trained = TrainingConfig.model_validate({**TRAINING.model_dump(), **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_train_step", remembered)
        fitted = training.fit(run, "line", params, SHAPE, line_sums, batches, TOTAL, trained, evaluate)
    assert len(programs) <= min(trained.steps_per_call, 2)
    assert all(program._cache_size() == 1 for program in programs), "every call must go through one program"
    return fitted


@pytest.mark.parametrize("stop", [0, 2, 3, 4, 9])
def test_28_a_stop_at_any_step_and_a_resume_leave_the_same_bytes(
    make_run: Callable[..., Run], tmp_path: Path, stop: int
) -> None:
    def evaluate(params: Any) -> dict[str, float]:
        return {"kernel_sum": float(params["kernel"].sum())}

    whole = fit(make_run(tmp_path / "whole"), batch_at, evaluate)

    def stopping(step: int) -> dict[str, np.ndarray]:
        if step == stop:
            raise Stopped
        return batch_at(step)

    run = make_run(tmp_path / "stopped")
    with pytest.raises(Stopped):
        fit(run, stopping, evaluate)
    asked: list[int] = []

    def remembering(step: int) -> dict[str, np.ndarray]:
        asked.append(step)
        return batch_at(step)

    resumed = fit(make_run(tmp_path / "stopped"), remembering, evaluate)
    assert asked == list(range(stop // 3 * 3, TOTAL)), "training must go on from the checkpoint, not from the start"
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(left, right)
    lines = (tmp_path / "whole" / "line" / "metrics.jsonl").read_bytes()
    assert lines == (tmp_path / "stopped" / "line" / "metrics.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [2, 3, 4, 6, 8, 9, 10]


def test_lines_of_metrics_that_are_lost_are_named_and_stop_nothing(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    fit(make_run(tmp_path / "whole"), batch_at)

    def stopping(step: int) -> dict[str, np.ndarray]:
        if step == 8:
            raise Stopped
        return batch_at(step)

    run = make_run(tmp_path / "copied")
    with pytest.raises(Stopped):
        fit(run, stopping)
    # As where the folder was copied while it was written to: a checkpoint of step 6, and the figures of before.
    path = tmp_path / "copied" / "line" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    resumed = make_run(tmp_path / "copied")
    fit(resumed, batch_at)
    said = resumed.console.file.getvalue()  # type: ignore[attr-defined]
    assert "ends at step 3, but step 6 was logged before the checkpoint of step 6" in said
    assert path.read_bytes() == b"".join(
        line for line in (tmp_path / "whole" / "line" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        if json.loads(line)["step"] not in (4, 6)
    )  # fmt: skip
    again = make_run(tmp_path / "copied")
    fit(again, batch_at)
    assert "lost" not in again.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [0, 4, 5, 9])
def test_28_sigterm_saves_the_step_at_work_and_the_resumed_run_is_the_same(
    make_run: Callable[..., Run], tmp_path: Path, stop: int
) -> None:
    whole = fit(make_run(tmp_path / "whole"), batch_at)

    def preempted(step: int) -> dict[str, np.ndarray]:
        assert step <= stop, "no step is begun after the signal"
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    run = make_run(tmp_path / "stopped")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught, stops_on_sigterm():
        fit(run, preempted)
    assert caught.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert max(int(path.name) for path in (tmp_path / "stopped/line/checkpoints").iterdir()) == stop + 1
    asked: list[int] = []

    def remembering(step: int) -> dict[str, np.ndarray]:
        asked.append(step)
        return batch_at(step)

    resumed = fit(make_run(tmp_path / "stopped"), remembering)
    assert asked == list(range(stop + 1, TOTAL))
    np.testing.assert_array_equal(whole.params["kernel"], resumed.params["kernel"])
    names = [tmp_path / name / "line" / "metrics.jsonl" for name in ("whole", "stopped")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_28_sigterm_at_an_unlogged_step_saves_no_state_that_is_not_finite(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    def poisoned(step: int) -> dict[str, np.ndarray]:
        batch = batch_at(step)
        if step == 4:  # Step 5 is neither logged nor saved by itself.
            batch["x"] = np.full_like(batch["x"], np.nan)
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.raises(TrainingDiverged, match="last good checkpoint is step 3"), stops_on_sigterm():
        fit(make_run(tmp_path), poisoned)
    assert [path.name for path in (tmp_path / "line/checkpoints").iterdir()] == ["3"]
    assert (
        fit(make_run(tmp_path), batch_at).params["kernel"]
        == fit(make_run(tmp_path / "whole"), batch_at).params["kernel"]
    ).all()


def test_28_sigterm_stops_at_once_where_nothing_must_be_saved_and_when_it_comes_twice(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    with pytest.raises(Preempted), stops_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on after the signal")

    def impatient(step: int) -> dict[str, np.ndarray]:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on after the second signal")

    with pytest.raises(Preempted), stops_on_sigterm():
        fit(make_run(tmp_path), impatient)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_28_a_signal_whose_exception_is_lost_still_stops_where_nothing_must_be_saved() -> None:
    def collected(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            os.kill(os.getpid(), signal.SIGTERM)

    went_on = []
    with pytest.raises(Preempted), stops_on_sigterm():
        gc.callbacks.append(collected)
        try:
            # What a callback of the garbage collector raises is printed and dropped.
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                gc.collect()
        finally:
            gc.callbacks.remove(collected)
        went_on.append(True)
        stop_between()
    assert went_on


def test_28_what_is_saved_at_the_signal_is_on_disk_before_that_is_said(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    real, said = Run.say, []

    def say(self: Run, text: str) -> None:
        said.append((text, sorted(path.name for path in run.directory.rglob("checkpoints/[0-9]*"))))
        real(self, text)

    monkeypatch.setattr(Run, "say", say)

    def at_step_two(step: int) -> dict[str, np.ndarray]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    with pytest.raises(Preempted), stops_on_sigterm():
        fit(run, at_step_two)
    assert [steps for text, steps in said if "asked to stop" in text] == [["2"]]


def test_a_step_asks_once_whether_to_stop(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal between two questions would save a step whose figures nobody has looked at."""
    asked: list[int] = []

    def late() -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr(training, "asked_to_stop", late)
    fit(make_run(tmp_path), batch_at)
    assert len(asked) == TOTAL


def test_28_a_torn_checkpoint_is_neither_gone_on_from_nor_named_as_good(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    def stopping(step: int) -> dict[str, np.ndarray]:
        if step == 7:
            raise Stopped
        return batch_at(step)

    with pytest.raises(Stopped):
        fit(make_run(tmp_path), stopping)
    folder = tmp_path / "line" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]
    os.truncate(folder / "6" / "extra.json", 0)

    def poisoned(step: int) -> dict[str, np.ndarray]:
        batch = batch_at(step)
        return {**batch, "poison": np.full((6,), np.nan, np.float32)}

    with pytest.raises(TrainingDiverged, match=r"diverged at step 4: .*last good checkpoint is step 3"):
        fit(make_run(tmp_path), poisoned)

    def preempted(step: int) -> dict[str, np.ndarray]:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    # At the torn one's step the state is saved again.
    with pytest.raises(Preempted), stops_on_sigterm():
        fit(make_run(tmp_path), preempted)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"] and find_damage(folder / "6") is None


def test_28_a_finished_training_is_not_repeated(make_run: Callable[..., Run], tmp_path: Path) -> None:
    first = fit(make_run(tmp_path), batch_at)
    metrics = (tmp_path / "line" / "metrics.jsonl").read_bytes()

    def never(step: int) -> dict[str, np.ndarray]:
        raise AssertionError(f"batch {step} was asked for")

    again = fit(make_run(tmp_path), never)
    np.testing.assert_array_equal(first.params["kernel"], again.params["kernel"])
    assert (tmp_path / "line" / "metrics.jsonl").read_bytes() == metrics


def test_a_fresh_state_may_come_from_arrays_that_stay_alive(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path)
    params = {"kernel": jnp.ones((3,), jnp.float32)}
    optimizer = make_optimizer(TRAINING.optimizer, TOTAL)
    state = training.fresh_state(params, optimizer, run.mesh)
    step = make_train_step(line_sums, optimizer, 1)
    for number in range(2):
        state, _ = step(state, training.place_batch(batch_at(number), run.mesh))
    np.testing.assert_array_equal(params["kernel"], [1.0, 1.0, 1.0])


def test_training_begins_and_goes_on_with_one_state_in_memory(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the parameters it began with nor, behind a checkpoint, the fresh state stay beside the trained one."""
    save = Checkpoints.save

    def save_and_wait(self: Checkpoints, *arguments: Any) -> None:
        save(self, *arguments)
        # Until then there are copies.
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    restore = Checkpoints.restore

    def count_and_restore(self: Checkpoints, expected: Any) -> Any:
        restoring.append(count())
        return restore(self, expected)

    monkeypatch.setattr(Checkpoints, "restore", count_and_restore)
    alive, restoring = list[int](), list[int]()

    def count() -> int:
        gc.collect()
        return sum(array.shape == (3,) for array in jax.live_arrays())

    def stopping(step: int) -> dict[str, np.ndarray]:
        alive.append(count())
        if step == 7 and len(alive) == 8:
            raise Stopped
        return batch_at(step)

    before = count()
    with pytest.raises(Stopped):
        fit(make_run(tmp_path), stopping)
    fit(make_run(tmp_path), stopping)
    # The kernel and its two moments.
    assert {number - before for number in alive} == {3}
    # What training would have begun with, in case that no checkpoint is whole.
    assert restoring == [before + 1]


def test_with_torn_checkpoints_alone_training_starts_over(make_run: Callable[..., Run], tmp_path: Path) -> None:
    whole = fit(make_run(tmp_path / "whole"), batch_at)

    def stopping(step: int) -> dict[str, np.ndarray]:
        if step == 4:
            raise Stopped
        return batch_at(step)

    with pytest.raises(Stopped):
        fit(make_run(tmp_path / "torn"), stopping)
    (extra,) = (tmp_path / "torn/line/checkpoints").glob("*/extra.json")
    extra.write_text("{")
    again = fit(make_run(tmp_path / "torn"), batch_at)
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(left, right)


def test_half_precision_parameters_are_trained_in_float32(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path)
    params = {"kernel": jnp.ones((3,), jnp.bfloat16)}
    state = training.fresh_state(params, make_optimizer(TRAINING.optimizer, TOTAL), run.mesh)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) == 3 and all(leaf.dtype == jnp.float32 for leaf in floats)


def test_divergence_names_the_step_and_the_last_good_checkpoint(make_run: Callable[..., Run], tmp_path: Path) -> None:
    def poisoned(step: int) -> dict[str, np.ndarray]:
        batch = batch_at(step)
        return {**batch, "poison": np.full((6,), np.nan, np.float32)} if step >= 4 else batch

    with pytest.raises(TrainingDiverged, match=r"line: diverged at step 6: .*loss is nan.*checkpoint is step 3"):
        fit(make_run(tmp_path), poisoned)
    # The bad state is not saved: what was good can be gone on from.
    fit(make_run(tmp_path), batch_at)


def test_28_sigterm_while_held_out_figures_are_made_saves_that_step_and_begins_no_other(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    def evaluate(params: Any) -> dict[str, float]:
        if stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"kernel_sum": float(params["kernel"].sum())}

    def remembering(step: int) -> dict[str, np.ndarray]:
        asked.append(step)
        return batch_at(step)

    stops, asked = False, list[int]()
    whole = fit(make_run(tmp_path / "whole"), batch_at, evaluate)
    stops = True
    with pytest.raises(Preempted), stops_on_sigterm():
        fit(make_run(tmp_path / "stopped"), remembering, evaluate)
    stops = False
    assert asked == [0, 1, 2]
    resumed = fit(make_run(tmp_path / "stopped"), batch_at, evaluate)
    np.testing.assert_array_equal(whole.params["kernel"], resumed.params["kernel"])
    names = [tmp_path / name / "line" / "metrics.jsonl" for name in ("whole", "stopped")]
    assert names[0].read_bytes() == names[1].read_bytes()


# Calls of steps 1 to 4 and 5 to 8; what is left goes one by one.
SEVERAL = {"steps_per_call": 4, "checkpoint_every": 4, "log_every": 3}


def test_several_steps_a_call_are_the_same_steps(make_run: Callable[..., Run], tmp_path: Path) -> None:
    one = fit(make_run(tmp_path / "one"), batch_at, **{**SEVERAL, "steps_per_call": 1})
    several = fit(make_run(tmp_path / "several"), batch_at, **SEVERAL)
    assert int(several.step) == TOTAL
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    lines, others = (
        [json.loads(line) for line in (tmp_path / name / "line/metrics.jsonl").read_bytes().splitlines()]
        for name in ("one", "several")
    )
    assert [line["step"] for line in others] == [3, 4, 6, 8, 9, 10]
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stop", [3, 4, 6, 8, 9])
@pytest.mark.parametrize("signalled", [False, True])
def test_28_several_steps_a_call_resume_to_the_same_bytes(
    make_run: Callable[..., Run], tmp_path: Path, stop: int, signalled: bool
) -> None:
    whole = fit(make_run(tmp_path / "whole"), batch_at, **SEVERAL)

    def stopping(step: int) -> dict[str, np.ndarray]:
        if step == stop:
            if not signalled:
                raise Stopped
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    with pytest.raises(Preempted if signalled else Stopped), stops_on_sigterm():
        fit(make_run(tmp_path / "stopped"), stopping, **SEVERAL)
    asked: list[int] = []

    def remembering(step: int) -> dict[str, np.ndarray]:
        asked.append(step)
        return batch_at(step)

    resumed = fit(make_run(tmp_path / "stopped"), remembering, **SEVERAL)
    # After a signal the call at work is made whole and saved.
    begins = min(stop // 4 * 4 + 4, TOTAL) if signalled else stop // 4 * 4
    assert asked == list(range(begins, TOTAL))
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(left, right)
    names = [tmp_path / name / "line" / "metrics.jsonl" for name in ("whole", "stopped")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_steps_of_other_shapes_go_one_by_one(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As packed rows do, of which a step has as many as it needs."""
    made: list[bool] = []

    def counted(*arguments: Any, several: bool = False) -> Any:
        program = make_train_step(*arguments, several=several)

        def call(state: Any, batch: Any) -> Any:
            made.append(several)
            return program(state, batch)

        return call

    def wider(step: int) -> dict[str, np.ndarray]:
        batch = batch_at(step)
        # Twice the same rows: the same mean, and so the same step.
        return {name: np.concatenate([rows, rows]) for name, rows in batch.items()} if step == 5 else batch

    monkeypatch.setattr(training, "make_train_step", counted)
    found = []
    for name, batches in (("alike", batch_at), ("ragged", wider)):
        run = make_run(tmp_path / name)
        params = jax.device_put({"kernel": jnp.ones((3,), jnp.float32)}, replicated(run.mesh))
        trained = TrainingConfig.model_validate({**TRAINING.model_dump(), **SEVERAL})
        found.append(training.fit(run, "line", params, SHAPE, line_sums, batches, TOTAL, trained, None))
    assert made == [True, True, False, False] + [True] + [False] * 6
    np.testing.assert_allclose(found[0].params["kernel"], found[1].params["kernel"], rtol=1e-5)


def test_guards_look_at_every_step_of_a_call(make_run: Callable[..., Run], tmp_path: Path) -> None:
    def poisoned(step: int) -> dict[str, np.ndarray]:
        batch = batch_at(step)
        return {**batch, "poison": np.full((6,), np.nan, np.float32)} if step == 5 else batch

    with pytest.raises(TrainingDiverged, match=r"line: diverged at step 6: .*loss is nan.*checkpoint is step 4"):
        fit(make_run(tmp_path / "stopped"), poisoned, **SEVERAL)
    skipping = {**SEVERAL, "guards": {"non_finite": "skip"}, "log_every": 1}
    for name, settings in (("one", {**skipping, "steps_per_call": 1}), ("several", skipping)):
        run = make_run(tmp_path / name)
        assert int(fit(run, poisoned, **settings).step) == TOTAL - 1
        said = run.console.file.getvalue()  # type: ignore[attr-defined]
        assert "line: skipped step 6: loss is nan" in said and "line: 1 of 10 steps were skipped" in said
    lines, others = (
        [json.loads(line) for line in (tmp_path / name / "line/metrics.jsonl").read_bytes().splitlines()]
        for name in ("one", "several")
    )
    assert [line["skipped"] for line in others] == [0.0] * 5 + [1.0] + [0.0] * 4
    # The learning rate too: a skipped step leaves its place in the schedule to the next one.
    for line, other in zip(lines, others, strict=True):
        known, found = ({name: value for name, value in one.items() if value is not None} for one in (line, other))
        assert found == pytest.approx(known, rel=1e-5, abs=1e-6)


def test_several_steps_a_call_on_a_mesh(make_run: Callable[..., Run], tmp_path: Path) -> None:
    alone = fit(make_run(tmp_path / "alone"), batch_at, **SEVERAL)
    run = make_run(tmp_path / "mesh", mesh=MeshConfig(data=3), devices=3)
    together = fit(run, batch_at, **SEVERAL)
    np.testing.assert_allclose(alone.params["kernel"], together.params["kernel"], rtol=1e-5)
    rows = training.place_batches([batch_at(0), batch_at(1)], run.mesh)["x"]
    assert rows.shape == (2, 6, 4) and rows.addressable_shards[0].data.shape == (2, 2, 4)


def test_as_many_checkpoints_stay_as_asked_for(make_run: Callable[..., Run], tmp_path: Path) -> None:
    for kept, names in ((1, ["10"]), (3, ["10", "6", "9"])):
        fit(make_run(tmp_path / str(kept)), batch_at, max_to_keep=kept)
        assert sorted(path.name for path in (tmp_path / str(kept) / "line/checkpoints").iterdir()) == names


def test_a_state_is_saved_between_two_calls() -> None:
    with pytest.raises(ValueError, match="10 must be divisible by steps_per_call 4"):
        TrainingConfig.model_validate({"steps_per_call": 4, "checkpoint_every": 10})


def test_a_batch_that_does_not_fit_the_mesh_is_refused_by_name(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path, mesh=MeshConfig(data=4), devices=4)
    for several in (1, 3):
        with pytest.raises(InputError, match="batch_size: 6 rows can't be split over 4 devices"):
            fit(run, batch_at, steps_per_call=several)


def test_steps_of_whole_epochs() -> None:
    assert training.count_steps(TRAINING.model_copy(update={"epochs": 3}), 13) == 6
    assert training.count_steps(TRAINING, 5) == 1
    assert training.fixed_length(33) == 40 and training.fixed_length(48) == 48
