"""Whole runs killed at random moments and started again end with the same bytes; SIGTERM saves and exits 0."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

# Shared by all tests' runs and kept between them, so that a run mostly waits for nothing but its own start.
CACHE = Path(__file__).parents[1] / ".jax_cache"
# Small enough that most of a run is start-up, with every stage in it and a checkpoint at nearly every step.
TINY = """
name: tiny
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
ppo: {steps: 3, batch_size: 16, checkpoint_every: 1, sample_every: 2}
evaluation: {queries: 24, curve_queries: 16, bootstrap_samples: 100}
"""


class Runs:
    """Starts `almost-jax run` on one experiment, in folders of its own, with compiled programs kept between runs."""

    def __init__(self, home: Path, experiment: Path) -> None:
        self.home = home
        self.experiment = experiment

    def start(self, name: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "XDG_CACHE_HOME": str(CACHE),
        }
        command = [sys.executable, "-m", "almost_jax", "run", str(self.experiment), "--out", str(self.home / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, name: str) -> str:
        process = self.start(name)
        said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, said
        return said

    def stop(self, name: str, how: signal.Signals, seconds: float) -> tuple[int, str]:
        """Send a signal once the run holds its folder and `seconds` have passed; its exit code and what it said."""
        process = self.start(name)
        status = self.home / name / "status.json"
        began = time.time()
        while process.poll() is None and not (status.exists() and status.stat().st_mtime >= began):
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(how)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

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
    for needed in ("rlsf/metrics.jsonl", "responses.jsonl", "evaluation/gold.json"):
        assert needed in expected
    for model in ("reward", "sft", "dpo", "rlsf"):
        assert any(name.startswith(f"{model}/model/params") for name in expected)


def kill_and_compare(runs: Runs, kills: int, seed: int) -> None:
    began = time.time()
    runs.finish("whole")
    spent = time.time() - began
    moments = random.Random(seed)
    killed = sum(
        runs.stop("killed", signal.SIGKILL, moments.uniform(0, spent / kills))[0] == -signal.SIGKILL
        for _ in range(kills)
    )
    assert killed >= kills // 2, "most kills must hit a run at work"
    runs.finish("killed")
    check_equal(runs.results("killed"), runs.results("whole"))


@pytest.fixture
def tiny_runs(tmp_path: Path, experiments_folder: Path) -> Runs:
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(f"base: {experiments_folder / 'microworld_smoke.yaml'}\n{TINY}", encoding="utf-8")
    return Runs(tmp_path, experiment)


@pytest.mark.slow
def test_28_twelve_kills_over_the_smoke_experiment_leave_the_same_bytes(
    tmp_path: Path, experiments_folder: Path
) -> None:
    kill_and_compare(Runs(tmp_path, experiments_folder / "microworld_smoke.yaml"), kills=12, seed=12)


def test_28_three_kills_and_a_sigterm_over_every_stage_leave_the_same_bytes(tiny_runs: Runs) -> None:
    kill_and_compare(tiny_runs, kills=3, seed=3)
    code, said = tiny_runs.stop("preempted", signal.SIGTERM, 3.0)
    assert code == 0, said
    tiny_runs.finish("preempted")
    check_equal(tiny_runs.results("preempted"), tiny_runs.results("whole"))
