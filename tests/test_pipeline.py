"""The pipeline with stages that only write a line: order, skipping, resuming, staleness and its reasons, the lock."""

import ast
import dataclasses
import errno
import fcntl
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from almost_jax import folder, inputs, pipeline
from almost_jax.commands.runs import _out_of_date
from almost_jax.config import ExperimentConfig, Section
from almost_jax.errors import InputError, TrainingDiverged
from almost_jax.evaluation.judge import REPLIES
from almost_jax.experiments import load_experiment
from almost_jax.folder import is_locked, locked, read_status
from almost_jax.io.run import Run
from almost_jax.pipeline import STAGES, Stage, make_plan, run_experiment
from almost_jax.report.page import _NOTED

NAMES = [stage.name for stage in STAGES]


class Bench:
    """Runs the real list of stages with recorded stand-ins for their functions."""

    def __init__(self, folder: Path, experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = folder / "run"
        self.experiment = experiment
        self.ran: list[str] = []
        self.instead: dict[str, Callable[[Run], dict[str, Any]]] = {}
        self.lines = ""
        stages = tuple(dataclasses.replace(stage, run=self._stand_in(stage)) for stage in STAGES)
        monkeypatch.setattr(pipeline, "STAGES", stages)

    def _stand_in(self, stage: Stage) -> Callable[[Run], dict[str, Any]]:
        def run_stage(run: Run) -> dict[str, Any]:
            self.ran.append(stage.name)
            if stage.name in self.instead:
                return self.instead[stage.name](run)
            for output in stage.outputs:
                run.path(output).parent.mkdir(parents=True, exist_ok=True)
                if output.endswith((".jsonl", ".md", ".html")):
                    run.path(output).write_text(f"{stage.name} {run.config.seed} {run.config.ppo.kl_coef}")
                else:
                    run.path(output, "model", "params").mkdir(parents=True, exist_ok=True)
                    run.path(output, "model", "model.json").write_text("{}")
                    run.path(output, "model", "params", "files.json").write_text('{"data": [3, "digest"]}')
                    run.path(output, "model", "params", "data").write_text("abc")
                    run.path(output, "model", "weights").write_text(f"{run.config.seed} {run.config.ppo.kl_coef}")
            return {"outputs": len(stage.outputs)}

        return run_stage

    def __call__(self, overrides: Sequence[str] = (), until: str | None = None) -> list[str]:
        """Run and give the stages that ran."""
        self.ran = []
        stream = io.StringIO()
        try:
            config = load_experiment(self.experiment, overrides)
            run_experiment(config, self.directory, until, False, Console(file=stream, width=300))
        finally:
            self.lines = stream.getvalue()
        return self.ran

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.directory)): path.read_bytes()
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and "stale" not in path.parts and path.name not in ("status.json", "config.yaml", ".lock")
        }


@pytest.fixture
def bench(tmp_path: Path, micro_experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, micro_experiment, monkeypatch)


def interrupt(run: Run) -> dict[str, Any]:
    run.path("responses.jsonl.partial").write_text("half")
    raise KeyboardInterrupt


def fail(run: Run) -> dict[str, Any]:
    raise RuntimeError("out of\nluck")


def finish_responses(run: Run) -> dict[str, Any]:
    text = run.path("responses.jsonl.partial").read_text()
    run.path("responses.jsonl.partial").unlink()
    run.path("responses.jsonl").write_text(text + " and half")
    return {}


def test_stages_run_in_order_and_say_what_they_were(bench: Bench) -> None:
    assert bench() == NAMES
    status = json.loads((bench.directory / "status.json").read_text())["stages"]
    assert list(status) == NAMES
    for entry in status.values():
        assert entry["state"] == "done" and entry["summary"]["outputs"] == len(entry["outputs"])
        assert entry["ended"] >= entry["started"] and entry["versions"]["jax"] and entry["error"] is None
    assert load_experiment(bench.directory / "config.yaml", []) == load_experiment(bench.experiment, [])


def test_finished_stages_are_skipped(bench: Bench) -> None:
    bench()
    before = bench.files()
    assert bench() == []
    assert bench.lines.count("done already") == len(NAMES) and bench.files() == before


def test_until_stops_after_its_stage_and_the_next_run_goes_on(bench: Bench) -> None:
    assert bench(until="comparisons") == NAMES[: NAMES.index("comparisons") + 1]
    states = {name: entry["state"] for name, entry in status_file(bench).items()}
    assert states["comparisons"] == "done" and states["reward"] == "pending"
    assert bench() == NAMES[NAMES.index("comparisons") + 1 :]


def test_until_an_unknown_stage_is_bad_input(bench: Bench) -> None:
    with pytest.raises(InputError, match="did you mean reward"):
        bench(until="rewrd")
    assert not bench.directory.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["mesh.explicit=true", "sft.training.micro_batches=16"],
            "sft.training.micro_batches: 64 rows must be a multiple of devices x micro_batches = 8 x 16 with mesh",
        ),
        (["mesh.explicit=true", "as_is_reward.training.micro_batches=32"], "as_is_reward.training.micro_batches: 64"),
        (["mesh.explicit=true", "reward.training.micro_batches=64"], "reward.training.micro_batches: 64 rows must be"),
        (["mesh.explicit=true", "dpo={training: {micro_batches: 16}}"], "dpo.training.micro_batches: 64 rows must be"),
        (
            ["mesh.explicit=true", "ppo.num_mini_batches=4", "ppo.micro_batches=16"],
            "ppo.micro_batches: 64 rows of a mini-batch must be a multiple of devices x micro_batches = 8 x 16",
        ),
        (["sft.training.batch_size=60"], "sft.training.batch_size: 60 rows can't be split over 8 devices; use"),
    ],
)
def test_batches_that_the_mesh_cannot_split_are_refused_before_any_stage(
    bench: Bench, overrides: list[str], expected: str
) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        bench(overrides)
    assert bench.ran == []
    # Until the stage in question, and packed, whose rows are made to fit, there is nothing to refuse.
    bench(overrides, until="queries")
    section = expected.split(".")[0]
    if section in ("sft", "reward", "as_is_reward"):
        bench([*overrides, f"{section}.packed_length=512"])


def test_batches_of_stages_that_are_done_are_not_looked_at(bench: Bench) -> None:
    bench(["sft.training.batch_size=64"])
    assert bench(["mesh.explicit=true", "sft.training.micro_batches=16"]) == []


def test_the_batches_of_the_ablation_are_those_of_the_reward_model(bench: Bench) -> None:
    bench(["reward_ablation=null"])
    with pytest.raises(InputError, match=r"reward.training.micro_batches: 64 rows must be"):
        bench(["mesh.explicit=true", "reward.training.micro_batches=64"])
    assert bench(["mesh.explicit=true", "reward.training.micro_batches=64", "reward_ablation=null"]) == []


def status_file(bench: Bench) -> dict[str, Any]:
    return dict(json.loads((bench.directory / "status.json").read_text())["stages"])


def test_an_interrupted_stage_resumes_with_what_it_had(bench: Bench) -> None:
    bench.instead["responses"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench()
    before = status_file(bench)["responses"]
    assert before["state"] == "running" and bench.ran == NAMES[: NAMES.index("responses") + 1]
    bench.instead["responses"] = finish_responses
    assert bench() == NAMES[NAMES.index("responses") :]
    assert "responses: resume" in bench.lines
    assert (bench.directory / "responses.jsonl").read_text() == "half and half"
    after = status_file(bench)["responses"]
    assert after["started"] == before["started"] and after["seconds"] >= before["seconds"]


def test_a_failed_stage_says_so_and_resumes(bench: Bench) -> None:
    bench.instead["reward"] = fail
    with pytest.raises(RuntimeError):
        bench()
    entry = status_file(bench)["reward"]
    assert entry["state"] == "failed" and entry["error"] == "RuntimeError: out of luck"
    del bench.instead["reward"]
    assert bench() == NAMES[NAMES.index("reward") :]
    assert status_file(bench)["reward"]["error"] is None


def stopped_by_a_guard(run: Run) -> dict[str, Any]:
    run.path("rlsf").mkdir(exist_ok=True)
    run.path("rlsf", "half").write_text("half")
    raise TrainingDiverged("rlsf: diverged at step 3: kl 231.4 is above ppo.guards.max_kl 200")


@pytest.mark.parametrize(
    ("before", "now", "goes_on"),
    [
        ([], ["max_kl=400"], True),
        ([], ["kl=off"], True),
        ([], ["kl=skip", "max_kl=400"], True),
        ([], ["min_entropy=1e-4", "max_skips=20"], True),
        ([], ["non_finite=skip"], True),
        # What stops a stage or looks away leaves no trace in what is finished.
        ([], ["max_kl=100", "min_entropy=0.1"], True),
        (["kl=off"], ["kl=stop"], True),
        # What skips does, at the steps before.
        ([], ["kl=skip", "max_kl=100"], False),
        (["kl=off"], ["kl=skip"], False),
        (["kl=skip"], ["kl=skip", "max_kl=400"], False),
        (["kl=skip"], ["kl=skip", "max_skips=20"], True),
        (["kl=skip"], ["kl=skip", "max_skips=2"], False),
        (["kl=skip"], ["kl=stop"], False),
    ],
)
def test_a_stage_that_a_guard_stopped_goes_on_with_looser_ones(
    bench: Bench, before: list[str], now: list[str], goes_on: bool
) -> None:
    def guards(settings: list[str]) -> list[str]:
        return [f"ppo.guards.{setting}" for setting in settings]

    bench.instead["rlsf"] = stopped_by_a_guard
    with pytest.raises(TrainingDiverged):
        bench(guards(before))
    del bench.instead["rlsf"]
    assert bench(guards(now), until="rlsf") == ["rlsf"]
    assert f"rlsf: {'resume' if goes_on else 'stale'}: ppo.guards." in bench.lines
    assert (bench.directory / "rlsf/half").exists() == goes_on
    # Done, it is of these settings: neither run again with them nor taken for one of others.
    assert bench(guards(now), until="rlsf") == []


def test_looser_guards_and_another_change_make_a_stage_stale(bench: Bench) -> None:
    bench.instead["rlsf"] = stopped_by_a_guard
    with pytest.raises(TrainingDiverged):
        bench()
    with pytest.raises(TrainingDiverged):
        bench(["ppo.guards.max_kl=400", "ppo.kl_coef=0.2"])
    assert "rlsf: stale: ppo.guards.max_kl" in bench.lines or "rlsf: stale: ppo.kl_coef" in bench.lines


@pytest.mark.parametrize("change", ["sft.z_loss=0.5", "reward.margin=0.5"])
def test_looser_guards_on_other_models_make_a_stage_stale(bench: Bench, change: str) -> None:
    bench.instead["rlsf"] = stopped_by_a_guard
    with pytest.raises(TrainingDiverged):
        bench()
    del bench.instead["rlsf"]
    assert "rlsf" in bench(["ppo.guards.non_finite=skip", change], until="rlsf")
    assert "rlsf: stale: ppo.guards.non_finite" in bench.lines and not (bench.directory / "rlsf/half").exists()


@pytest.mark.parametrize(
    "override",
    ["ppo.guards.max_kl=400", "ppo.guards.max_kl=1", "ppo.guards.kl=off", "ppo.guards.max_skips=3",
     "sft.training.guards.non_finite=off"],
)  # fmt: skip
def test_guards_that_stop_or_look_away_make_nothing_stale(bench: Bench, override: str) -> None:
    bench()
    assert bench([override]) == []


def test_guards_that_skip_count(bench: Bench) -> None:
    bench()
    assert bench(["ppo.guards.kl=skip"])[0] == "rlsf"
    assert bench(["ppo.guards.kl=skip", "ppo.guards.max_kl=3"])[0] == "rlsf"
    assert bench(["ppo.guards.kl=skip", "ppo.guards.max_kl=3", "ppo.guards.min_entropy=0.1"]) == []
    assert bench(["sft.training.guards.non_finite=skip"])[0] == "sft"


def test_outputs_of_these_guards_from_the_start_go_before_looser_ones(bench: Bench) -> None:
    bench(["ppo.guards.non_finite=skip"], until="rlsf")
    bench.instead["rlsf"] = stopped_by_a_guard
    with pytest.raises(TrainingDiverged):
        bench()
    whole = bench(["ppo.guards.non_finite=skip"], until="rlsf")
    assert whole == [] and "back from stale/" in bench.lines


@pytest.mark.parametrize("override", ["kl_coef=0.3", "steps=3", "sample_every=1", "guards.max_kl=3", "kl_target=9"])
def test_ppo_with_too_weak_a_penalty_has_some_keys_of_its_own(bench: Bench, override: str) -> None:
    bench()
    assert "over_optimisation" not in bench([f"ppo.{override}"])
    assert "over_optimisation" in bench(["ppo.gamma=0.9"])


def test_what_is_not_up_to_date_is_known_to_the_report_command(bench: Bench) -> None:
    bench()
    assert _out_of_date(bench.directory) == []
    bench(["ppo.kl_coef=0.1"], until="rlsf")
    (said,) = _out_of_date(bench.directory)
    assert "evaluation is stale (upstream rlsf is stale)" in said and "rlsf is stale" in said
    assert not re.search(r"[:;] (rlsf|sft|report) is", said)
    bench.instead["evaluation"] = fail
    with pytest.raises(RuntimeError):
        bench(["ppo.kl_coef=0.1"])
    (said,) = _out_of_date(bench.directory)
    assert "evaluation is unfinished" in said
    (bench.directory / "config.yaml").write_text("seed: [")
    (said,) = _out_of_date(bench.directory)
    assert said.startswith("Whether all of this is up to date can't be told (")


def test_a_report_built_in_between_is_made_again(bench: Bench) -> None:
    bench()
    page = bench.directory / "report.html"
    whole = page.read_text()
    page.write_text(f"<head>{_NOTED}</head>")
    assert bench() == ["report"] and page.read_text() == whole
    assert "report: resume: report.html was built in between, from stages that were not up to date" in bench.lines


def test_who_makes_a_damaged_record_again_is_said(bench: Bench) -> None:
    bench(until="comparisons")
    damaged = bench.directory / "comparisons.jsonl"

    def stumble(run: Run) -> dict[str, Any]:
        raise InputError(f"{damaged}, line 60: not JSON")

    bench.instead["reward"] = stumble
    with pytest.raises(InputError, match=r"line 60: not JSON; delete it, and the stage comparisons makes it again$"):
        bench()
    del bench.instead["reward"]
    damaged.unlink()
    assert bench()[:2] == ["comparisons", "reward"]
    scores = bench.directory / "reward_ablation" / "scores.jsonl"

    def stumble_later(run: Run) -> dict[str, Any]:
        raise InputError(f"{scores}: is gone")

    bench.instead["report"] = stumble_later
    with pytest.raises(InputError, match=r"is gone; delete it, and the stage reward_ablation makes it again$"):
        bench(["name=other"])


def test_a_changed_key_makes_its_stage_and_what_follows_stale_and_says_why(bench: Bench) -> None:
    bench()
    before = bench.files()
    assert bench(["ppo.kl_coef=0.1"]) == ["rlsf", "evaluation", "benchmarks", "report"]
    assert "rlsf: stale: ppo.kl_coef: 0.05 -> 0.1\n" in bench.lines
    assert "evaluation: stale: upstream rlsf is stale\n" in bench.lines
    assert "report: stale: upstream evaluation is stale, upstream benchmarks is stale\n" in bench.lines
    after = bench.files()
    changed = {path.split("/")[0] for path in before if before[path] != after[path]}
    assert changed == {"rlsf", "evaluation", "report.md", "report.html", "figures"}
    kept = list((bench.directory / "stale").glob("rlsf-*/rlsf/model/weights"))
    assert [path.read_bytes() for path in kept] == [before["rlsf/model/weights"]]


def test_what_is_gone_from_stale_is_made_again(bench: Bench) -> None:
    bench()
    bench(["ppo.kl_coef=0.1"])
    (model,) = (bench.directory / "stale").glob("rlsf-*/rlsf")
    shutil.rmtree(model)
    assert bench()[0] == "rlsf"
    assert "back from stale/" in bench.lines and "rlsf: resume: rlsf is missing" in bench.lines
    assert b"0.05" in bench.files()["rlsf/model/weights"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_28_outputs_that_were_set_aside_by_half_come_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """A kill while they are moved, and then the old settings after all."""
    bench()
    before, move, moves = bench.files(), folder._move, []

    def killed(source: Path, target: Path) -> None:
        if len(moves) == moved:
            raise KeyboardInterrupt
        moves.append(source)
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder, "_move", killed)
        bench(["ppo.kl_coef=0.1"])
    assert bench() == [] and bench.files() == before


def test_a_full_disk_leaves_what_was_to_be_set_aside(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench()
    before, write = bench.files(), folder.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == "entry.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(folder, "write_bytes", full)
        bench(["ppo.kl_coef=0.1"])
    assert bench() == [] and bench.files() == before


def test_events_of_every_model_of_a_stage_go_with_it(bench: Bench) -> None:
    bench()
    for name in ("sft", "sft_self_play"):
        (bench.directory / "tensorboard" / name).mkdir(parents=True)
    bench(["sft.z_loss=0.1"], until="sft")
    assert not list((bench.directory / "tensorboard").iterdir())
    assert len(list((bench.directory / "stale").glob("sft-*/tensorboard/*"))) == 2


def test_old_settings_bring_old_outputs_back(bench: Bench) -> None:
    bench()
    before = bench.files()
    bench(["ppo.kl_coef=0.1"])
    assert bench() == []
    assert bench.files() == before and "back from stale/" in bench.lines
    assert bench(["ppo.kl_coef=0.1"]) == []
    assert b"0.1" in bench.files()["rlsf/model/weights"]


def test_outputs_of_an_interrupted_stage_come_back_unfinished(bench: Bench) -> None:
    bench.instead["responses"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench()
    del bench.instead["responses"]
    bench(["comparisons.sampling.temperature=0.5"])
    assert not (bench.directory / "responses.jsonl.partial").exists()
    bench.instead["responses"] = finish_responses
    assert bench()[0] == "responses"
    assert (bench.directory / "responses.jsonl").read_text() == "half and half"


def test_a_kill_while_outputs_come_back_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench()
    before = bench.files()
    bench(["ppo.kl_coef=0.1"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "bring_back", killed)
        with pytest.raises(KeyboardInterrupt):
            bench()
    assert bench() == [] and bench.files() == before


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=1", "queries"),
        ("queries.count=7", "queries"),
        ("compute_dtype=bfloat16", "queries"),
        ("comparisons.configurations.C.shots=4", "audit"),
        ("as_is_reward.pairs=9", "as_is_reward"),
        ("filters.length_rule=false", "comparisons"),
        ("audit.queries=5", "audit"),
        ("reward.margin=0.5", "reward"),
        ("reward_ablation.held_out=50", "reward_ablation"),
        ("demonstrations.n=2", "demonstrations"),
        ("sft.training.epochs=2", "sft"),
        ("evaluation.best_of=2", "evaluation"),
        ("evaluation.hhh={}", "benchmarks"),
        ("name=other", "report"),
    ],
)
def test_a_key_is_read_by_the_right_stage(bench: Bench, override: str, first: str) -> None:
    bench()
    ran = bench([override])
    assert ran[0] == first and ran[-1] == "report"


def test_filters_run_again_without_new_responses(bench: Bench) -> None:
    bench()
    # Comparisons and what rests on them, but nothing that generates for them.
    assert bench(["filters.heuristic=false"]) == NAMES[NAMES.index("comparisons") :]


@pytest.mark.parametrize(
    "override",
    [
        "comparisons.sampling.batch_size=3",
        "demonstrations.user_sampling.batch_size=3",
        "demonstrations.sampling.steps_per_wake=3",
        "ppo.sampling.refill=false",
        "demonstrations.user_sampling.prefill_tokens=3",
        "comparisons.sampling.group_batches=3",
        "ppo.micro_batches=2",
        "ppo.judge_micro_batches=2",
        "reward.packed_length=512",
        "sft.packed_length=512",
        "sft.training.checkpoint_every=3",
        "sft.training.steps_per_call=2",
        "ppo.max_to_keep=3",
        "ppo.log_every=3",
        "mesh.data=8",
        "queries.self_instruct.in_context=3",
    ],
)
def test_keys_that_change_no_result_make_nothing_stale(bench: Bench, override: str) -> None:
    bench()
    assert bench([override]) == []


@pytest.mark.parametrize(
    "change",
    ["concurrency=9", "timeout=9.0", "attempts=9", "pause=9.0", "max_requests=9", "max_tokens=9", "key_variable=OTHER"],
)
def test_how_a_judge_is_asked_makes_nothing_stale(bench: Bench, tmp_path: Path, change: str) -> None:
    (tmp_path / "questions.jsonl").write_text("{}")
    judges = ["audit.judge={model: judge-1}", f"evaluation.vicuna={{questions: {tmp_path}/questions.jsonl}}"]
    bench(judges)
    assert bench([*judges, f"audit.judge.{change}", f"evaluation.vicuna.{change}"]) == []


def test_what_a_judge_is_asked_counts(bench: Bench) -> None:
    bench(["audit.judge={model: judge-1}"])
    assert bench(["audit.judge={model: judge-1, reply_tokens: 9}"])[0] == "audit"


@pytest.mark.parametrize("override", ["audit.bootstrap_samples=9", "evaluation.hhh={}"])
def test_a_stale_stage_leaves_the_judges_replies(bench: Bench, override: str) -> None:
    bench()
    replies = bench.directory / REPLIES
    replies.mkdir()
    (replies / "one.json").write_text("paid")
    assert bench([override])[0] in ("audit", "benchmarks")
    assert (replies / "one.json").read_text() == "paid"


def test_the_order_of_configurations_counts() -> None:
    reads = next(stage.reads for stage in STAGES if stage.name == "comparisons")
    config = load_experiment(Path(__file__).parents[1] / "experiments" / "microworld.yaml", [])
    dump = config.model_dump(mode="json")
    turned = dict(reversed(dump["comparisons"]["configurations"].items()))
    dump["comparisons"]["configurations"] = turned
    leaves = dict(inputs._flatten(dump, ""))
    assert leaves["comparisons.configurations.order"] == ["E", "D", "C", "B", "A"]
    assert any("comparisons.configurations.order".startswith(read) for read in reads)


def test_another_model_behind_a_name_is_noticed(bench: Bench, tmp_path: Path) -> None:
    bench()
    (tmp_path / "medium" / "weights").write_text("better")
    assert bench()[0] == "audit"
    assert "responses: stale: content of models.medium: " in bench.lines


def test_a_large_model_is_told_from_another_by_its_content_and_not_by_its_date(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "HASHED_BYTES", 1000)
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 16)
    weights = tmp_path / "medium" / "weights"
    data = bytearray(range(256)) * 64
    weights.write_bytes(data)
    bench()
    os.utime(weights, (1, 1))  # as a copy on another machine has it
    assert bench() == []
    for place in (0, len(data) - 1):
        data[place] ^= 1
        weights.write_bytes(data)
        assert bench()[0] == "audit"


def test_a_changed_file_of_demonstrations_is_noticed(bench: Bench, tmp_path: Path) -> None:
    prompt = tmp_path / "user.yaml"
    turns = "dialogues:\n" + "- turns: [{human: a}, {assistant: b}]\n" * 3
    prompt.write_text(turns)
    override = [f"demonstrations.user.demonstrations={prompt}"]
    bench(override)
    prompt.write_text(turns.replace("b", "c"))
    assert bench(override)[0] == "demonstrations"
    assert "content of demonstrations.user.demonstrations: " in bench.lines


def test_a_changed_file_behind_the_prompt_of_vicuna_is_noticed(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("{}")
    prompt = tmp_path / "few.yaml"
    prompt.write_text("dialogues:\n- turns: [{human: a}, {assistant: b}]\n")
    override = [f"evaluation.vicuna={{questions: {tmp_path}/questions.jsonl, prompt: '{prompt}:1'}}"]
    bench(override)
    prompt.write_text("dialogues:\n- turns: [{human: a}, {assistant: c}]\n")
    assert bench(override)[0] == "benchmarks"


def test_a_missing_output_is_made_again_and_nothing_else(bench: Bench) -> None:
    bench()
    before = bench.files()
    (bench.directory / "responses.jsonl").unlink()
    assert bench() == ["responses"]
    assert "responses: resume: responses.jsonl is missing" in bench.lines and bench.files() == before
    # A folder may be there, and its model in part.
    for damage in ("params/data", "params/files.json", "model.json"):
        (bench.directory / "sft" / "model" / damage).write_text("")
        if damage == "model.json":
            (bench.directory / "sft" / "model" / damage).unlink()
        assert bench() == ["sft"]
        assert "sft: resume: sft/model is missing" in bench.lines and bench.files() == before


def test_outputs_that_status_does_not_know_are_set_aside_not_trusted(bench: Bench) -> None:
    bench.directory.mkdir()
    (bench.directory / "queries.jsonl").write_text("mine")
    assert bench()[0] == "queries"
    assert [path.read_text() for path in (bench.directory / "stale").rglob("queries.jsonl")] == ["mine"]


def test_two_processes_cannot_share_a_folder(bench: Bench) -> None:
    code = (
        "import sys, pathlib, almost_jax.folder as f\n"
        "with f.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(bench.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(InputError, match=f"in use by process {holder.pid} "):
            bench()
        assert bench.ran == []
    finally:
        holder.communicate("")
    assert bench() == NAMES


def test_who_only_looks_whether_a_folder_is_locked_keeps_nobody_out(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    with (tmp_path / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with locked(tmp_path):
            assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_the_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", '{"stages": 3}', '{"stages": {"queries": {"state": "done"}}}'])
def test_a_damaged_status_is_bad_input_and_nothing_is_touched(bench: Bench, content: str) -> None:
    bench()
    before = bench.files()
    (bench.directory / "status.json").write_text(content)
    with pytest.raises(InputError, match=r"status.json: is damaged"):
        bench()
    assert bench.files() == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("models.small=/nowhere", "models.small: '/nowhere': there is no folder"),
        ("models.large=microworld:huge", "models.large: 'microworld:huge': there is no folder"),
        ("comparisons.configurations.B.shots=99", "comparisons.configurations.B"),
        ("demonstrations.user.demonstrations=nobody", "demonstrations.user.demonstrations"),
        ("as_is_reward.votes=/nowhere.jsonl", "as_is_reward.votes: there is no file /nowhere.jsonl"),
        ("evaluation.vicuna={questions: /q, prompt: 'hhh:x'}", "evaluation.vicuna.prompt 'hhh:x': expected plain"),
        ("evaluation.vicuna={questions: /q, prompt: 'nobody:3'}", "evaluation.vicuna.prompt.demonstrations 'nobody': "),
        ("evaluation.vicuna={questions: /q, prompt: 'hhh:99'}", "evaluation.vicuna.prompt.demonstrations 'hhh': shots"),
        ("mesh.tensor=3", "mesh (data: -1, fsdp: 1, tensor: 3)"),
    ],
)
def test_missing_inputs_are_found_before_anything_happens(bench: Bench, override: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        bench([override])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not bench.directory.exists() and bench.ran == []


def test_summaries_may_hold_numpy_scalars(bench: Bench) -> None:
    np = pytest.importorskip("numpy")
    bench.instead["queries"] = lambda run: {"n": np.int64(3), "mean": np.float32(0.5)}
    bench(until="queries")
    assert read_status(bench.directory)["queries"]["summary"] == {"n": 3, "mean": 0.5}


def test_progress_reaches_status(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def counts(run: Run) -> dict[str, Any]:
        with run.progress("asking", 3, 1) as progress:
            progress.advance()
            seen.append(status_file(bench)["queries"]["steps"])
            progress.advance(1, found=0.5)
        return {}

    monkeypatch.setattr(pipeline, "SECONDS_BETWEEN_STEPS", 0.0)
    bench.instead["queries"] = counts
    bench(until="queries")
    assert seen == [{"description": "asking", "done": 2, "total": 3}]
    assert status_file(bench)["queries"]["steps"]["done"] == 3
    assert "asking: 1/3" in bench.lines and "asking: 3/3" in bench.lines and "found 0.5" in bench.lines


def test_a_plan_is_a_function_of_the_config_alone(bench: Bench, tmp_path: Path) -> None:
    config = load_experiment(bench.experiment, [])
    first = [plan.fingerprint.digest for plan in make_plan(config, tmp_path / "x", {})]
    assert first == [plan.fingerprint.digest for plan in make_plan(config, tmp_path / "y", {})]
    assert len(set(first)) == len(NAMES)


# What the list of stages itself says.


def test_stages_stand_after_what_they_read() -> None:
    for number, stage in enumerate(STAGES):
        assert set(stage.upstream) <= set(NAMES[:number])
    outputs = [output for stage in STAGES for output in stage.outputs]
    assert len(set(outputs)) == len(outputs)


def schema_leaves(section: type[Section], key: str) -> list[str]:
    leaves = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            leaves += schema_leaves(annotation, f"{key}{name}.")
        else:
            leaves.append(key + name)
    return leaves


def test_every_key_of_the_schema_is_read_by_a_stage_or_changes_no_result() -> None:
    read = [key for stage in STAGES for key in stage.reads]
    # In every fingerprint, or (mesh) in none: results do not depend on the devices, beyond rounding.
    places = ("preset", "data", "fsdp", "tensor", "dcn_data", "explicit", "remat", "attention")
    mesh = {f"mesh.{key}" for key in (*places, "vocab_chunk", "vocab_chunk_cpu")}
    mesh |= {leaf for leaf in schema_leaves(ExperimentConfig, "") if leaf.startswith("mesh.sampling")}
    everywhere = {"seed", "compute_dtype", "models"} | mesh
    for leaf in schema_leaves(ExperimentConfig, ""):
        assert leaf in everywhere or any(leaf == key or leaf.startswith(f"{key}.") for key in read), leaf


def config_reads(stage: Stage) -> list[ast.Attribute]:
    """Every `run.config.SECTION` in the stage's function and in what that calls in its own module."""
    module = ast.parse(inspect.getsource(sys.modules[stage.run.__module__]))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    waiting, seen = [stage.run.__name__], {stage.run.__name__}
    found = []
    while waiting:
        for node in ast.walk(functions[waiting.pop()]):
            if isinstance(node, ast.Name) and node.id in functions and node.id not in seen:
                seen.add(node.id)
                waiting.append(node.id)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "run.config":
                found.append(node)
    return found


def test_config_reads_are_found() -> None:
    # Otherwise the next test could pass for want of anything to look at.
    responses = next(stage for stage in STAGES if stage.name == "responses")
    assert {node.attr for node in config_reads(responses)} == {"comparisons"}
    assert all(config_reads(stage) for stage in STAGES if stage.name != "report")


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_a_stage_reads_no_section_that_it_does_not_name(stage: Stage) -> None:
    by_name = {known.name: known for known in STAGES}
    covered: set[str] = set()
    waiting = [stage.name]
    while waiting:
        known = by_name[waiting.pop()]
        covered |= {key.split(".")[0] for key in known.reads}
        waiting += known.upstream
    sections = set(ExperimentConfig.model_fields) - {"name", "seed", "compute_dtype", "mesh", "models"}
    for node in config_reads(stage):
        if node.attr in sections:
            assert node.attr in covered, f"{stage.name} reads {node.attr}, which no fingerprint before it holds"
