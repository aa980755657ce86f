"""Whole runs killed at random moments and started again end with the same bytes; SIGTERM saves and exits 0."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

# Shared by all tests' runs and kept between them, so that a run mostly waits for nothing but its own start.
CACHE = Path(__file__).parents[1] / ".jax_cache"
# Small enough that most of a run is start-up, with every stage in it and a checkpoint at nearly every step; one model
# stands for three, since nearly all of the time is compilation.
TINY = """
name: tiny
models: {medium: "microworld:small", large: "microworld:small"}
queries: {count: 32}
comparisons: {sampling: {max_new_tokens: 8, batch_size: 64}}
as_is_reward: {pairs: 48, held_out: 16, training: {batch_size: 16, checkpoint_every: 1}}
reward: {held_out: 8, reference_samples: 16, training: {batch_size: 8, checkpoint_every: 2}}
reward_ablation: {held_out: 8, max_steps: 3}
demonstrations:
  queries: 24
  baseline: false
  max_turns: 1
  sampling: {max_new_tokens: 8, batch_size: 64}
  user_sampling: {max_new_tokens: 8, batch_size: 64}
sft: {training: {batch_size: 8, checkpoint_every: 1}}
dpo: {held_out: 8, training: {batch_size: 8, checkpoint_every: 1}}
ppo: {steps: 3, batch_size: 16, checkpoint_every: 1, sample_every: 2, sampling: {max_new_tokens: 8}}
evaluation: {queries: 24, curve_queries: 16, bootstrap_samples: 100, sampling: {max_new_tokens: 8}}
"""


class Runs:
    """Starts `almost-jax run` on one experiment, in folders of its own, with compiled programs kept between runs."""

    def __init__(self, home: Path, experiment: Path, unoptimised: bool) -> None:
        self.home = home
        self.experiment = experiment
        self.unoptimised = unoptimised

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(flags) if self.unoptimised else "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(self.unoptimised)),
            "XDG_CACHE_HOME": str(CACHE),
        }
        arguments = ["run", str(self.experiment), "--out", str(self.home / name), *more]
        command = [sys.executable, "-m", "almost_jax", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, name: str, *more: str) -> str:
        process = self.start(name, *more)
        said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, said
        return said

    def status(self, name: str) -> dict[str, dict[str, Any]]:
        """What status.json says of every stage; nothing while there is none."""
        try:
            stages: dict[str, dict[str, Any]] = json.loads((self.home / name / "status.json").read_bytes())["stages"]
            return stages
        except FileNotFoundError:
            return {}

    def stop(self, name: str, how: signal.Signals, stage: str, seconds: float) -> tuple[int, str, list[str]]:
        """Send a signal so long after a stage, or one behind it, began to run.

        Returns:
            The exit code, what the run said, and the stages that were running when the signal came.
        """
        process = self.start(name)
        began = time.time()
        while process.poll() is None and not self._has_begun(name, stage, began):
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(how)
        said, _ = process.communicate(timeout=120)
        running = [own for own, entry in self.status(name).items() if entry["state"] == "running"]
        return process.returncode, said, running

    def _has_begun(self, name: str, stage: str, since: float) -> bool:
        entries = self.status(name)
        if stage not in entries or (self.home / name / "status.json").stat().st_mtime < since:
            return False
        behind = list(entries)[list(entries).index(stage) :]
        return any(entries[own]["state"] == "running" for own in behind)

    def results(self, name: str) -> dict[str, bytes]:
        """Every record and gold.json as they are, and the weights of all saved models.

        The files that weights lie in have random names, so that arrays are compared and not files.
        """
        folder = self.home / name
        paths = [*folder.rglob("*.jsonl"), *folder.rglob("gold.json")]
        found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            for path in folder.rglob("params"):
                leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path.absolute()))
                for place, leaf in leaves:
                    where = f"{path.relative_to(folder)}{jax.tree_util.keystr(place)}"
                    found[where] = np.asarray(leaf).tobytes()
        return found


def check_equal(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    for needed in ("rlsf/metrics.jsonl", "responses.jsonl"):
        assert needed in expected
    for model in ("reward", "sft", "dpo", "rlsf"):
        assert any(name.startswith(f"{model}/model/params") for name in expected)


def kill_and_compare(runs: Runs, kills: int, seed: int) -> list[str]:
    """Kill one run in several stages, at a random moment of each, and give the stages that were hit."""
    runs.finish("whole")
    spent = {stage: entry["seconds"] for stage, entry in runs.status("whole").items()}
    moments, order = random.Random(seed), list(spent)
    # Stages that take no time can't be hit but by luck.
    chosen = sorted(moments.sample([stage for stage in order if spent[stage] > 0.1], kills), key=order.index)
    hit: list[str] = []
    for stage in chosen:
        code, said, running = runs.stop("killed", signal.SIGKILL, stage, moments.uniform(0, spent[stage]))
        assert code in (-signal.SIGKILL, 0), said
        hit += running
    print("killed in", ", ".join(hit))
    assert len(hit) >= kills // 2, "most kills must hit a run at work"
    runs.finish("killed")
    expected = runs.results("whole")
    assert "evaluation/gold.json" in expected
    check_equal(runs.results("killed"), expected)
    return hit


@pytest.fixture
def tiny_runs(tmp_path: Path, experiments_folder: Path) -> Runs:
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(f"base: {experiments_folder / 'microworld_smoke.yaml'}\n{TINY}", encoding="utf-8")
    return Runs(tmp_path, experiment, unoptimised=True)


@pytest.mark.slow
def test_28_twelve_kills_over_the_smoke_experiment_leave_the_same_bytes(
    tmp_path: Path, experiments_folder: Path
) -> None:
    runs = Runs(tmp_path, experiments_folder / "microworld_smoke.yaml", unoptimised=False)
    hit = kill_and_compare(runs, kills=12, seed=12)
    assert len(set(hit)) >= 6, "all over the run"


def test_28_three_kills_and_a_sigterm_over_every_stage_leave_the_same_bytes(tiny_runs: Runs) -> None:
    kill_and_compare(tiny_runs, kills=3, seed=3)
    # Where there is a state to save, and where there is none.
    for stage in ("demonstrations", "rlsf"):
        code, said, _ = tiny_runs.stop("preempted", signal.SIGTERM, stage, 0.0)
        assert code == 0, said
        assert tiny_runs.status("preempted")[stage]["state"] != "done"
    # What is equal so far is all that later stages read.
    tiny_runs.finish("preempted", "--until", "rlsf")
    stages = list(tiny_runs.status("whole"))
    behind = stages[stages.index("rlsf") + 1 :]
    whole = tiny_runs.results("whole").items()
    check_equal(tiny_runs.results("preempted"), {name: own for name, own in whole if name.split("/")[0] not in behind})
