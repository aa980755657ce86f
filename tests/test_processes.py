"""The chain on several real processes: the records and weights of one process, also when one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.io.models import Model, load_model, save_model

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".jax_cache"
# Every stage that writes records or trains, on a model of one layer: nearly all of the time is compilation.
CHAIN = """
name: chain
models: {{small: {model}, medium: null, large: null}}
queries: {{count: 16}}
comparisons:
  configurations:
    A: {{model: small, demonstrations: "microworld:hhh", shots: 2}}
    B: null
    C: null
    D: null
    E: {{model: small, demonstrations: "microworld:hhh", shots: 1}}
  model_order: [small]
  demonstrations_order: ["microworld:hhh"]
  sampling: {{max_new_tokens: 6, batch_size: 16}}
filters: {{heuristic: false}}
as_is_reward: {{pairs: 24, held_out: 8, training: {{batch_size: 8, checkpoint_every: 1}}}}
reward: {{held_out: 2, reference_samples: 8, training: {{batch_size: 4, checkpoint_every: 1}}}}
demonstrations:
  assistant: {{model: small, shots: 1, demonstrations: "microworld:hhh"}}
  user: {{model: small, shots: 1, demonstrations: "microworld:user"}}
  queries: 12
  n: 2
  baseline: false
  max_turns: 1
  sampling: {{max_new_tokens: 6, batch_size: 16}}
  user_sampling: {{max_new_tokens: 6, batch_size: 16}}
sft: {{training: {{batch_size: 4, checkpoint_every: 2, steps_per_call: 2}}}}
reward_ablation: {{held_out: 2, max_steps: 1}}
dpo: {{held_out: 2, training: {{batch_size: 4, checkpoint_every: 1}}}}
ppo: {{steps: 2, batch_size: 8, sampling: {{max_new_tokens: 6, batch_size: 8}}, checkpoint_every: 1, sample_every: 1}}
audit: {{queries: 0}}
over_optimisation: null
evaluation: {{gold: false, prompted: null}}
"""


def saved_weights(folder: Path) -> dict[str, bytes]:
    """Every parameter of every model saved below a folder; their files have random names."""
    found = {}
    for path in folder.rglob("model.json"):
        params = load_model(str(path.parent), make_mesh(MeshConfig()), "float32").params
        for place, leaf in jax.tree_util.tree_leaves_with_path(params):
            found[f"{path.parent.relative_to(folder)}{jax.tree_util.keystr(place)}"] = np.asarray(leaf).tobytes()
    return found


class Processes:
    """Starts `almost-jax run` on one experiment as one process or several, each with some of `devices` CPU devices."""

    def __init__(self, home: Path, experiment: Path, devices: int) -> None:
        self.home = home
        self.experiment = experiment
        self.devices = devices

    def start(self, name: str, processes: int) -> subprocess.Popen[str]:
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={self.devices // processes}"]),
            "XDG_CACHE_HOME": str(CACHE),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "almost_jax", "run", str(self.experiment), "--out", str(self.home / name)]
        if processes > 1:
            command = [str(ROOT / "launch/local.sh"), str(processes), *command]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )

    def finish(self, name: str, processes: int) -> str:
        process = self.start(name, processes)
        said, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, said
        return said

    def results(self, name: str) -> dict[str, bytes]:
        """Every record and metric as it is, and the weights of all saved models."""
        folder = self.home / name
        records = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl")}
        return records | saved_weights(folder)


@pytest.fixture
def chain(tmp_path: Path, experiments_folder: Path) -> Path:
    """An experiment file on a random model of one layer that reads the micro-world's words."""
    mesh = make_mesh(MeshConfig())
    tokenizer = load_model("microworld:small", mesh, "float32").tokenizer
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, tie_embeddings=True, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    params = init_params(config, jax.random.key(7))
    save_model(tmp_path / "model", Model(config, params, tokenizer, "policy", "random"))
    path = tmp_path / "chain.yaml"
    base = experiments_folder / "microworld_smoke.yaml"
    path.write_text(f"base: {base}\n{CHAIN.format(model=tmp_path / 'model')}", encoding="utf-8")
    return path


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    assert sorted(found) == sorted(expected)
    for needed in ("responses.jsonl", "comparisons.jsonl", "demonstrations.jsonl", "rlsf/metrics.jsonl"):
        assert expected[needed].count(b"\n") > 1, needed
    return [name for name in expected if found[name] != expected[name]]


def test_two_processes_leave_the_bytes_of_one(tmp_path: Path, chain: Path) -> None:
    runs = Processes(tmp_path, chain, devices=2)
    # Side by side: most of both is compilation, which runs on one core.
    whole = runs.start("whole", 1)
    said = runs.finish("two", 2)
    out, _ = whole.communicate(timeout=900)
    assert whole.returncode == 0, out
    assert differing(runs.results("two"), runs.results("whole")) == []
    lines = said.splitlines()
    assert sum("sft: done" in line for line in lines) == 1, "one process speaks"
    assert not list((tmp_path / "two").rglob("*.partial")) and not list((tmp_path / "two").rglob(".saving*"))


@pytest.mark.slow
def test_four_processes_one_killed_end_like_one_that_was_not(tmp_path: Path, chain: Path) -> None:
    runs = Processes(tmp_path, chain, devices=4)
    runs.finish("whole", 1)
    expected = runs.results("whole")
    runs.finish("four", 4)
    check_close(runs.results("four"), expected)
    process = runs.start("killed", 4)
    log = tmp_path / "killed" / "sft" / "checkpoints" / "2"
    began = time.monotonic()
    while process.poll() is None and not log.exists():
        assert time.monotonic() - began < 1200
        time.sleep(0.05)
    victim = one_of(process.pid)
    os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 137, said
    assert not (tmp_path / "killed" / "rlsf" / "model").exists(), "the kill must hit a run at work"
    runs.finish("killed", 4)
    assert differing(runs.results("killed"), runs.results("four")) == []


def check_close(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same texts; numbers may differ in their last bits, since four devices' sums are added in another order."""
    for name in differing(found, expected):
        if not name.endswith(".jsonl"):
            own, theirs = (np.frombuffer(side[name], np.float32) for side in (found, expected))
            np.testing.assert_allclose(own, theirs, atol=2e-5, err_msg=name)
            continue
        for own, theirs in zip(found[name].splitlines(), expected[name].splitlines(), strict=True):
            assert parted(json.loads(own))[0] == parted(json.loads(theirs))[0], name
            np.testing.assert_allclose(parted(json.loads(own))[1], parted(json.loads(theirs))[1], atol=1e-4)


def parted(tree: object) -> tuple[list[object], list[float]]:
    """The leaves of a record that must be equal, and the floats among them."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
    floats = [leaf for leaf in leaves if isinstance(leaf, float)]
    return [leaf for leaf in leaves if not isinstance(leaf, float)], floats


def one_of(parent: int) -> int:
    """A process that runs the command under launch/local.sh, not the first one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            ppid = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if ppid == parent and b"almost_jax" in words:
            found.append(int(entry.name))
    return max(found)
