"""Guards of training: each case is made to happen, and stops or is skipped by one line that says where and why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from almost_jax.config import PpoConfig, PpoGuardsConfig
from almost_jax.errors import TrainingDiverged
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.models import load_model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.stages import rlsf, sft
from almost_jax.stages.guards import Guard, Problem, rollout_problems

FIGURES = {"reward": 0.5, "kl": 3.0, "rollout_entropy": 1.2, "at_limit": 0.9}


def said(run: Run) -> str:
    return " ".join(run.console.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "figures, message",
    [
        ({"reward": float("nan")}, "reward is nan"),
        ({"kl": float("-inf")}, "kl is -inf"),
        ({"kl": 7.5}, "kl 7.5 is above ppo.guards.max_kl 7"),
        ({"rollout_entropy": 0.01}, "entropy 0.01 is below ppo.guards.min_entropy 0.02"),
        ({"at_limit": 1.0}, "all responses were cut at ppo.sampling.max_new_tokens 256"),
    ],
)
def test_every_kind_of_problem_is_seen_by_its_own_guard(figures: dict[str, float], message: str) -> None:
    ppo = PpoConfig(guards=PpoGuardsConfig(max_kl=7.0, min_entropy=0.02, length="skip"))
    assert rollout_problems(FIGURES, ppo) == []
    assert [problem.why for problem in rollout_problems({**FIGURES, **figures}, ppo)] == [message]
    # Without a reference there is no KL to look at.
    assert rollout_problems({name: value for name, value in FIGURES.items() if name != "kl"}, ppo) == []


def test_exploding_kl_stops_and_names_the_last_good_checkpoint(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path, kl_coef=1e-3, guards={"max_kl": 1e-3}, checkpoint_every=1)
    with pytest.raises(TrainingDiverged) as error:
        rlsf.run_stage(run)
    assert str(error.value).startswith("rlsf: diverged at step 2: kl ")
    assert str(error.value).endswith("is above ppo.guards.max_kl 0.001; there is no good checkpoint before it")
    assert "\n" not in str(error.value)
    assert [line["step"] for line in read_records(run.path("rlsf", "metrics.jsonl"))] == [1]


@pytest.mark.parametrize(
    "figure, overlap, last_good",
    [
        ({"kl": 999.0}, False, 5),  # The checkpoint of step 6 holds the policy that strayed.
        ({"kl": 999.0}, True, 4),  # That of step 5, and what nobody has looked at yet.
        ({"rollout_entropy": float("nan")}, False, 5),
        ({"reward": float("nan")}, False, 6),  # Nothing is wrong with the policy.
    ],
)
def test_a_good_checkpoint_is_one_before_the_policy_that_strayed(
    make_ppo: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: dict[str, float],
    overlap: bool,
    last_good: int,
) -> None:
    run = make_ppo(tmp_path, steps=7, checkpoint_every=1, overlap_rollouts=overlap, keep_reference=True)
    monkeypatch.setattr(Checkpoints, "steps", lambda self: [3, 4, 5, 6])
    fetch = rlsf.fetched
    monkeypatch.setattr(rlsf, "fetched", lambda figures: {**fetch(figures), **figure})
    learn = rlsf.learn

    def seventh(run: Run, state: Any, actors: Any, gathered: Any, step: int, update: Any, guard: Any) -> Any:
        return learn(run, state, actors, gathered, 7, update, guard)

    monkeypatch.setattr(rlsf, "learn", seventh)
    message = f"diverged at step 7: .*; the last good checkpoint is step {last_good}$"
    with pytest.raises(TrainingDiverged, match=message):
        rlsf.run_stage(run)


def test_skipped_steps_left_the_policy_that_strayed_as_it_was(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path)
    checkpoints = Mock(steps=lambda: [2, 3, 4, 5])
    guard = Guard(run, "rlsf", checkpoints, 2, {})
    astray = [Problem("skip", "kl 999", of_policy=True)]
    for step in (5, 6):
        assert guard.skips(step, astray, drawn_by=step - 1)
    with pytest.raises(TrainingDiverged, match="the last good checkpoint is step 3$"):
        guard.skips(7, astray, drawn_by=6)
    assert said(run).count("the last good checkpoint is step 3") == 2


def test_a_skipped_step_behind_rollouts_ahead_says_nothing_of_the_policy_that_drew_them(
    make_ppo: Callable[..., Run], tmp_path: Path
) -> None:
    guard = Guard(make_ppo(tmp_path), "rlsf", Mock(steps=lambda: [4, 5, 6, 7]), 5, {})
    astray = [Problem("skip", "kl 999", of_policy=True)]
    assert guard.skips(7, astray, drawn_by=5)
    # Step 6 was learned from, so its policy, which drew these, isn't that of step 5.
    with pytest.raises(TrainingDiverged, match="the last good checkpoint is step 5$"):
        guard.skips(8, [Problem("stop", "kl 999", of_policy=True)], drawn_by=6)


def test_a_step_with_some_updates_made_left_another_policy(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    guard = Guard(make_ppo(tmp_path), "rlsf", Mock(steps=lambda: [3, 4, 5, 6]), 5, {})
    assert guard.skips(6, [Problem("skip", "loss is nan in update 1 of 4")])
    # The policy of step 5 drew the rollouts of step 6, which were fine.
    with pytest.raises(TrainingDiverged, match="the last good checkpoint is step 5$"):
        guard.skips(7, [Problem("stop", "kl 999", of_policy=True)], drawn_by=6)


@pytest.mark.parametrize("guard", ["entropy", "length"])
def test_skipped_steps_leave_the_policy_alone_and_too_many_stop(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    # An entropy that no policy over 20 words has, and a policy that never stops.
    guards = {guard: "skip", "max_skips": 2, **({"min_entropy": 9.0} if guard == "entropy" else {})}
    if guard == "length":
        draw = rlsf.draw

        def endless(*arguments: Any) -> Any:
            samples = draw(*arguments)
            return samples.replace(stopped=np.zeros(samples.stopped.shape, bool))

        monkeypatch.setattr(rlsf, "draw", endless)
    run = make_ppo(tmp_path, guards=guards, checkpoint_every=1)
    with pytest.raises(TrainingDiverged, match=r"rlsf: diverged at step 3: .*; 2 steps in a row were skipped"):
        rlsf.run_stage(run)
    assert said(run).count("rlsf: skipped step") == 2 and "there is no good checkpoint before it" in said(run)
    lines = read_records(run.path("rlsf", "metrics.jsonl"))
    assert [line["skipped"] for line in lines] == [1, 1] and "policy_loss" not in lines[0]
    before, after = (
        load_model(str(run.path("rlsf", "policies", name)), run.mesh, "float32").params for name in ("0", "2")
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # The count goes on from the checkpoint: a resumed run stops at the same step.
    again = make_ppo(tmp_path, guards=guards, checkpoint_every=1)
    with pytest.raises(TrainingDiverged, match="diverged at step 3"):
        rlsf.run_stage(again)
    assert "skipped step" not in said(again)


def poisoned(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The advantages of one step are NaN, so that its losses and gradients are."""
    experience, calls = rlsf.experience, []

    def wrong(judged: Any, *rest: Any) -> Any:
        learned, figures = experience(judged, *rest)
        calls.append(1)
        if len(calls) == call:
            learned = learned.replace(advantages=learned.advantages.at[0].set(np.nan))
        return learned, figures

    monkeypatch.setattr(rlsf, "experience", wrong)


def test_an_update_that_is_not_finite_is_left_out(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 2)
    run = make_ppo(tmp_path, guards={"non_finite": "skip"})
    rlsf.run_stage(run)
    lines = read_records(run.path("rlsf", "metrics.jsonl"))
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    # One of the two mini-batches holds the bad row in each epoch; the other one is learned from and logged.
    assert all(line["policy_loss"] is not None and line["policy_grad_norm"] > 0 for line in lines)
    assert "rlsf: skipped step 2: loss is nan" in said(run) and "rlsf: 1 of 4 steps were skipped" in said(run)
    assert "of 4; there is no good checkpoint before it" in said(run)
    final = load_model(str(run.path("rlsf", "model")), run.mesh, "float32")
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(final.params))


def test_an_update_that_is_not_finite_stops_by_default(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 3)
    with pytest.raises(TrainingDiverged, match=r"step 3: loss is nan.*in update \d of 4.*good checkpoint is step 2"):
        rlsf.run_stage(make_ppo(tmp_path))


@pytest.mark.parametrize("action", ["stop", "skip", "off"])
def test_supervised_training_stops_skips_or_looks_away(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """The second batch's loss is infinite."""
    loss_sums = sft.sft_loss_sums

    def wrong(params: Any, batch: Any, **settings: Any) -> Any:
        total, rest = loss_sums(params, {name: batch[name] for name in ("tokens", "targets")}, **settings)
        return total * batch["scale"][0], rest

    example_batch, calls = sft.example_batch, []

    def batches(*arguments: Any) -> Any:
        calls.append(1)
        found = example_batch(*arguments)
        return {**found, "scale": np.full(len(found["tokens"]), np.inf if len(calls) == 2 else 1.0, np.float32)}

    monkeypatch.setattr(sft, "sft_loss_sums", wrong)
    monkeypatch.setattr(sft, "example_batch", batches)
    training = {"batch_size": 8, "checkpoint_every": 1, "log_every": 1, "max_length": 64}
    run = make_run(tmp_path, sft={"training": {**training, "guards": {"non_finite": action}}})
    if action == "stop":
        with pytest.raises(TrainingDiverged, match=r"sft: diverged at step 2: .*the last good checkpoint is step 1"):
            sft.fine_tune(run, "sft", "demonstrations.jsonl")
        return
    sft.fine_tune(run, "sft", "demonstrations.jsonl")
    lines = [json.loads(line) for line in run.path("sft", "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    model = load_model(str(run.path("sft", "model")), run.mesh, "float32")
    finite = all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.params))
    if action == "skip":
        assert losses[1] is None and [line["skipped"] for line in lines] == [0, 1, 0] and finite
        # The skipped update's learning rate is the next one's.
        assert [line["learning_rate"] for line in lines] == pytest.approx([1e-5, 2e-5 / 3, 2e-5 / 3])
        assert "sft: skipped step 2: " in said(run) and "loss is inf; the last good checkpoint is step 1" in said(run)
        assert "sft: 1 of 3 steps were skipped" in said(run)
        # The third step is the second update, at the rate that the second would have had.
        first, second, third = (line["learning_rate"] for line in lines)
        assert first > second == third
    else:
        assert losses[1:] == [None, None] and not finite and "were skipped" not in said(run)
        assert [line["learning_rate"] for line in lines] == pytest.approx([1e-5, 2e-5 / 3, 1e-5 / 3])
