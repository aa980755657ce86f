"""Options of PPO, through the stage: frozen models, no reference, early stop, rollouts ahead, KL in the loss."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from almost_jax.config import MeshConfig, PpoConfig
from almost_jax.io.models import load_model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.sampling.scoring import score_sequences
from almost_jax.sampling.stops import StopStrings
from almost_jax.stages import rlsf
from almost_jax.stages.actors import frozen, load_actors
from almost_jax.stages.dialogues import dialogue_tokens
from almost_jax.stages.templates import Turn


def lines_of(run: Run) -> list[dict[str, Any]]:
    return read_records(run.path("rlsf", "metrics.jsonl"))


def test_without_a_kl_penalty_no_reference_is_kept_or_run(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_ppo(tmp_path, kl_coef=0.0, steps=2)
    judge, seen = rlsf.judge, []

    def watching(policy: Any, reference: Any, *rest: Any) -> Any:
        seen.append(reference)
        return judge(policy, reference, *rest)

    monkeypatch.setattr(rlsf, "judge", watching)
    summary = rlsf.run_stage(run)
    assert seen == [None, None]
    assert all("kl" not in line for line in lines_of(run)) and "kl" not in summary
    assert all(record["kl"] is None for record in read_records(run.path("rlsf", "samples.jsonl")))
    kept = make_ppo(tmp_path / "kept", kl_coef=0.0, steps=2, keep_reference=True)
    rlsf.run_stage(kept)
    assert seen[2] is not None and lines_of(kept)[1]["kl"] != 0
    # The penalty being nothing, both learn the same.
    assert [line["policy_loss"] for line in lines_of(kept)] == [line["policy_loss"] for line in lines_of(run)]
    for coefficient, controller, uses in ((0.1, "fixed", True), (0.1, "adaptive", True), (0.0, "fixed", False)):
        assert PpoConfig(kl_coef=coefficient, kl_controller=controller).uses_reference is uses
    with pytest.raises(ValidationError, match="0 stays 0; start above it"):
        PpoConfig(kl_coef=0.0, kl_controller="adaptive")
    with pytest.raises(ValidationError, match="12 responses: .* with steps of 60 responses"):
        PpoConfig(batch_size=60, kl_horizon=12, kl_controller="adaptive")
    PpoConfig(batch_size=60, kl_horizon=13, kl_controller="adaptive")
    with pytest.raises(ValidationError, match="a step of one update has none to stop"):
        PpoConfig(num_ppo_epochs=1, num_mini_batches=1, early_stop_kl=0.1)


def test_23_running_on_into_a_human_turn_that_takes_several_tokens_stops_and_is_penalised(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_ppo(tmp_path, steps=2, missing_eos_penalty=0.7, normalize_reward=False, kl_coef=0.0)
    # Here the label is one token; on a tokenizer that splits it the engine looks for its text, as for this word.
    monkeypatch.setattr(
        "almost_jax.stages.actors.spanning_stops", lambda tokenizer, stops: StopStrings((" red",), tokenizer.decode)
    )
    rlsf.run_stage(run)
    tokenizer = load_actors(run).sft.tokenizer
    reward = load_model(str(run.path("reward", "model")), run.mesh, "float32")
    records = read_records(run.path("rlsf", "rollouts.jsonl"))
    stopped = [record for record in records if record["finish"] == "stop" and "red" not in record["response"]]
    # The word is part of what was drawn, but not of what is read. (Special tokens have no text.)
    plain = [one for one in stopped if one["tokens"] == len(tokenizer.encode(one["response"])) + 1]
    assert len(plain) > 1 and any(record["response"] for record in plain)
    assert all(one["reward"] == pytest.approx(one["score"] - 0.7, abs=2e-4) for one in stopped)
    for record in plain:
        turns: list[Turn] = [
            {"role": "human", "text": record["query"]}, {"role": "assistant", "text": record["response"]},
        ]
        alone = score_sequences(
            reward.params, reward.config, [dialogue_tokens(tokenizer, turns)], batch_size=1, multiple=16
        )
        assert record["score"] == pytest.approx(float(alone[0]), abs=2e-4)
    limited = sum(record["finish"] == "length" for record in records) / len(records)
    assert np.mean([line["at_limit"] for line in lines_of(run)]) == pytest.approx(limited)


def test_frozen_models_are_cast_but_for_norms_and_head(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path, frozen_dtype="bfloat16", steps=2, judge_micro_batches=4)
    ppo, actors = run.config.ppo, load_actors(run)
    cast = frozen(actors, ppo, "float32")
    for params in (cast.sft.params, cast.reward.params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            narrow = path[-1].key in ("kernel", "embedding") and path[0].key != "score"
            assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), path
    as_computed = frozen(actors, ppo.model_copy(update={"frozen_dtype": "compute"}), "float32")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(as_computed.reward.params))
    size, narrow_size = (sum(leaf.nbytes for leaf in jax.tree.leaves(a.reward.params)) for a in (actors, cast))
    assert narrow_size < 0.6 * size
    rlsf.run_stage(run)
    # The reference is rounded, so it differs from the policy a little from the first step on.
    assert 0 < abs(lines_of(run)[0]["kl"]) < 0.5


def test_storing_frozen_models_in_the_compute_dtype_changes_no_bit(
    make_ppo: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_ppo(tmp_path)
    actors = load_actors(run)
    shapes = {
        name: dataclasses.replace(getattr(actors.players, name), dtype="bfloat16")
        for name in ("policy", "critic", "reward")
    }
    players = dataclasses.replace(actors.players, **shapes)
    tokens = jnp.full((2, 6), 5, jnp.int32)
    lengths = jnp.array([3, 6], jnp.int32)
    samples = rlsf.Samples(
        tokens=tokens, logprobs=jnp.zeros((2, 6)), lengths=lengths, content=lengths, stopped=jnp.zeros(2, bool)
    )
    found = [
        rlsf.judge(
            actors.sft.params, them.sft.params, actors.reward.params, them.reward.params,
            tokens, lengths, samples, players, 1,
        )
        for them in (actors, frozen(actors, run.config.ppo, "bfloat16"))
    ]
    np.testing.assert_array_equal(found[0].reference_logprobs, found[1].reference_logprobs)
    np.testing.assert_array_equal(found[0].scores, found[1].scores)


def test_updates_stop_where_the_policy_is_too_far(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, made = rlsf.learn, [0]

    def counting(*arguments: Any) -> Any:
        found = learn(*arguments)
        made.append(int(found[0].policy.step))
        assert found[0].critic.step == made[-1]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rlsf, "learn", counting)
        run = make_ppo(tmp_path, early_stop_kl=1e-4, num_ppo_epochs=4, steps=2)
        rlsf.run_stage(run)
    # The update that found it is not among those that were made.
    assert np.diff(made).tolist() == [line["updates"] for line in lines_of(run)]
    for line in lines_of(run):
        # The first update finds the policy where it sampled; 3e-3 takes it further than 1e-4.
        assert line["early_stopped"] == 1 and 1 <= line["updates"] < 8
        assert line["approx_kl"] <= 1e-4
    free = make_ppo(tmp_path / "free", early_stop_kl=50.0, num_ppo_epochs=4, steps=2)
    rlsf.run_stage(free)
    assert [(line["early_stopped"], line["updates"]) for line in lines_of(free)] == [(0, 8), (0, 8)]
    # The learning rate follows the updates that were made.
    assert lines_of(run)[1]["learning_rate"] > lines_of(free)[1]["learning_rate"]


# Not k1: its gradient is unbiased too, but too noisy for so few samples.
@pytest.mark.parametrize("estimator", [pytest.param("k2", marks=pytest.mark.slow), "k3"])
def test_kl_in_the_loss_keeps_it_out_of_the_rewards_and_holds_the_policy_back(
    make_ppo: Callable[..., Run], tmp_path: Path, estimator: str
) -> None:
    found = []
    for name, coefficient in (("weak", 1e-6), ("strong", 30.0)):
        run = make_ppo(tmp_path / name, kl_in="loss", kl_estimator=estimator, kl_coef=coefficient, critic="sft")
        rlsf.run_stage(run)
        lines = lines_of(run)
        assert all(line["shaped_reward"] == pytest.approx(line["score"], abs=1e-5) for line in lines)
        found.append(abs(lines[-1]["kl"]))
        assert "kl_loss" in lines[0]
    assert found[1] < 0.7 * found[0], found


@pytest.mark.slow
@pytest.mark.parametrize("average", ["sequence_mean", "fixed_length"])
def test_22_other_averages_do_not_depend_on_micro_batches(
    make_ppo: Callable[..., Run], tmp_path: Path, average: str
) -> None:
    found = []
    for parts in (1, 4):
        run = make_ppo(tmp_path / str(parts), loss_average=average, micro_batches=parts, num_mini_batches=1, steps=2)
        rlsf.run_stage(run)
        found.append(lines_of(run))
    for left, right in zip(*found, strict=True):
        for name in ("loss", "policy_grad_norm", "value_loss", "kl"):
            assert left[name] == pytest.approx(right[name], rel=2e-3, abs=2e-5), name


class Stopped(Exception):
    """What a kill looks like from inside."""


def test_28_rollouts_ahead_are_off_policy_by_one_step_and_resume_to_the_byte(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_ppo(tmp_path / "whole", overlap_rollouts=True)
    plain = make_ppo(tmp_path / "plain")
    for run in (whole, plain):
        rlsf.run_stage(run)
    lines, on_policy = lines_of(whole), lines_of(plain)
    assert [line["steps_off_policy"] for line in lines] == [0, 1, 1, 1] and "steps_off_policy" not in on_policy[0]
    # The first two steps' responses are both the SFT policy's, so the second has no KL yet, and a ratio that isn't 1.
    assert lines[0] == {**on_policy[0], "steps_off_policy": 0}
    assert abs(lines[1]["kl"]) < 1e-5 < abs(on_policy[1]["kl"]) and abs(lines[2]["kl"]) > 1e-5
    assert lines[1]["approx_kl"] > on_policy[1]["approx_kl"]
    for stop in (2, 3):
        save = rlsf.Checkpoints.save

        def stopping(self: Any, step: int, *rest: Any, stop: int = stop, save: Any = save) -> None:
            save(self, step, *rest)
            if step >= stop:
                raise Stopped

        folder = tmp_path / f"stopped{stop}"
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(rlsf.Checkpoints, "save", stopping)
            rlsf.run_stage(make_ppo(folder, overlap_rollouts=True))
        resumed = make_ppo(folder, overlap_rollouts=True)
        rlsf.run_stage(resumed)
        for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
            assert whole.path("rlsf", name).read_bytes() == resumed.path("rlsf", name).read_bytes()
        ours, theirs = (load_model(str(r.path("rlsf", "model")), r.mesh, "float32").params for r in (whole, resumed))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_rollouts_ahead_are_made_while_the_updates_run(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, learn, learning = rlsf.collect, rlsf.learn, threading.Event()

    def waiting(run: Run, state: Any, actors: Any, prompts: Any, step: int) -> Any:
        if step == 2:
            assert learning.wait(60), "the rollouts of step 2 must not hold up the updates of step 1"
        if step == 3 and run.directory.name == "failing":
            raise Stopped
        return collect(run, state, actors, prompts, step)

    def begun(*arguments: Any) -> Any:
        learning.set()
        found = learn(*arguments)
        # The parameters that were sampled from are gone by now, but for the copies.
        state = arguments[1]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.policy.params, state.critic.params)))
        return found

    monkeypatch.setattr(rlsf, "collect", waiting)
    monkeypatch.setattr(rlsf, "learn", begun)
    rlsf.run_stage(make_ppo(tmp_path / "whole", overlap_rollouts=True))
    failing = make_ppo(tmp_path / "failing", overlap_rollouts=True)
    with pytest.raises(Stopped):
        rlsf.run_stage(failing)
    assert [line["step"] for line in lines_of(failing)] == [1]

    def breaking(*arguments: Any) -> Any:
        raise Stopped

    # Whatever breaks the updates ends the stage, with the rollouts ahead made to their end.
    made = list[int]()
    monkeypatch.setattr(rlsf, "collect", lambda *given: (collect(*given), made.append(given[-1]))[0])
    monkeypatch.setattr(rlsf, "learn", breaking)
    broken = make_ppo(tmp_path / "broken", overlap_rollouts=True)
    with pytest.raises(Stopped):
        rlsf.run_stage(broken)
    assert made == [1, 2] and lines_of(broken) == []
    # Two devices would each take the two programs in an order of their own.
    monkeypatch.undo()
    several = make_ppo(tmp_path / "several", overlap_rollouts=True, steps=2, mesh=MeshConfig(data=2), devices=2)
    assert not rlsf.overlaps(several)
    rlsf.run_stage(several)
    assert [line["steps_off_policy"] for line in lines_of(several)] == [0, 1]


def test_rollouts_are_written_for_people_with_figures_that_add_up(
    make_ppo: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_ppo(tmp_path, batch_size=12, kl_coef=0.2)
    rlsf.run_stage(run)
    records = [json.loads(line) for line in run.path("rlsf", "rollouts.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1] * 12 + [2] * 12 + [4] * 12
    assert ["per_token" in record for record in records[:12]] == [True] * 8 + [False] * 4
    for record in records:
        assert record["query"] and record["finish"] in ("eos", "stop", "length")
        if "per_token" not in record:
            continue
        tokens = record["per_token"]
        assert len(tokens) == record["tokens"]
        assert sum(token["kl"] for token in tokens) == pytest.approx(record["kl"], abs=2e-3)
        rewards = sum(token["reward"] for token in tokens)
        assert rewards == pytest.approx(record["reward"] - 0.2 * record["kl"], abs=2e-3)
        assert np.mean([token["advantage"] for token in tokens]) == pytest.approx(record["advantage"], abs=2e-3)
        # The text is its tokens' but for the one that stopped it.
        words = [token["token"] for token in tokens]
        content = words if record["finish"] == "length" else words[:-1]
        assert record["response"].split() == [word for word in content if word]
