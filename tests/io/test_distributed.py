"""Where a process finds the others: the environment, a Cloud TPU's hosts, or nobody; and two processes that do."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from almost_jax.errors import InputError
from almost_jax.io import distributed
from almost_jax.io.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID, Place, read_place

ROOT = Path(__file__).parents[2]


def test_the_environment_gives_the_place() -> None:
    environment = {COORDINATOR: "10.0.0.3:8476", PROCESS_ID: "2", NUM_PROCESSES: "3"}
    assert read_place(environment) == Place("10.0.0.3:8476", 2, 3)
    assert read_place({"HOME": "/"}) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({PROCESS_ID: ""}, f"{PROCESS_ID} is not set"),
        ({PROCESS_ID: "3"}, f"{PROCESS_ID}: 3 should be below {NUM_PROCESSES}, which is 3"),
        ({PROCESS_ID: "-1"}, f"{PROCESS_ID}: '-1' should be a whole number"),
        ({NUM_PROCESSES: "three"}, f"{NUM_PROCESSES}: 'three' should be a whole number"),
        ({COORDINATOR: "10.0.0.3"}, f"{COORDINATOR}: '10.0.0.3' should be HOST:PORT"),
        ({COORDINATOR: "10.0.0.3:99999"}, f"{COORDINATOR}: '10.0.0.3:99999' should be HOST:PORT"),
    ],
)
def test_a_place_that_cannot_be_is_refused(change: dict[str, str], why: str) -> None:
    environment = {COORDINATOR: "10.0.0.3:8476", PROCESS_ID: "2", NUM_PROCESSES: "3"} | change
    with pytest.raises(InputError, match=why):
        read_place(environment)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of jax.distributed.initialize, which joins nobody."""
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
    for name in (COORDINATOR, PROCESS_ID, NUM_PROCESSES):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_process_alone_joins_nobody(joined: list[tuple]) -> None:
    distributed.initialize()
    assert joined == []


@pytest.mark.parametrize(("endpoints", "calls"), [("h0,h1,h2", [((), {})]), ("u:8470:10.0.0.1", [])])
def test_a_tpu_of_several_hosts_joins_by_itself(
    monkeypatch: pytest.MonkeyPatch, joined: list[tuple], endpoints: str, calls: list[tuple]
) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    # A TPU VM as jax sees one: libtpu and chips found, the rest from the metadata server.
    metadata = {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'z'"}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    distributed.initialize()
    assert joined == [], "the tests ask for the CPU, so the TPU does not matter"
    before = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        distributed.initialize()
    finally:
        jax.config.update("jax_platforms", before)
    assert joined == calls


# Each process has two devices and gives its devices' numbers; the sums can be right only if all four took part.
PROGRAM = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from almost_jax.io.distributed import initialize

initialize()
initialize()
assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
mine = np.arange(2, dtype=np.int32) + 2 * jax.process_index() + 1
values = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)
sums = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))(values)
print(f"process {jax.process_index()} has the sum {int(sums[0])}")
"""


def said_by_two(program: str, *arguments: str) -> list[str]:
    """The lines that two processes of a program print, sorted."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [str(ROOT / "launch/local.sh"), "2", sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return sorted(line for line in finished.stdout.splitlines() if " process " in line)


def test_two_processes_add_across_each_other() -> None:
    assert said_by_two(PROGRAM) == [f"[{i}] process {i} has the sum {1 + 2 + 3 + 4}" for i in range(2)]


# Three steps are saved; the last can't be read by process 1, and the one before it was cut.
CHECKPOINTS = """
import sys, time
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from almost_jax.io import checkpoints
from almost_jax.io.distributed import initialize, wait_for_all

initialize()
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("data"))
folder, own = Path(sys.argv[1]), jax.process_index()


def tree(step):
    mine = np.arange(2, dtype=np.float32) + 2 * own + 10 * step
    return {"x": jax.make_array_from_process_local_data(sharding, mine)}


saved = checkpoints.Checkpoints(folder, keep=3)
for step in (1, 2, 3):
    saved.save(step, tree(step), {"step": step})
# Nobody waits for it on the main thread, and yet it is there.
began = time.monotonic()
while not (folder / "3").is_dir():
    assert time.monotonic() - began < 120
    time.sleep(0.01)
saved.close()
wait_for_all()
if own == 0:
    (folder / "2" / "extra.json").write_bytes(b"")
wait_for_all()
read = checkpoints.restore_tree


def failing(path, expected):
    if own == 1 and path.parent.name == "3":
        raise OSError("no such device")
    return read(path, expected)


checkpoints.restore_tree = failing
again = checkpoints.Checkpoints(folder, keep=3, say=lambda line: print("process", own, "says", line))
step, found, extra = again.restore(tree(0))
values = [float(part.data[0]) for part in found["x"].addressable_shards]
print("process", own, "has step", step, extra, values, again.steps())
"""


def test_28_processes_go_on_from_a_checkpoint_that_all_of_them_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said = said_by_two(CHECKPOINTS, str(folder))
    cut = f"{folder}/2: torn checkpoint passed over (extra.json has 0 bytes of 11)"
    assert said == [
        "[0] process 0 has step 1 {'step': 1} [10.0, 11.0] [1]",
        f"[0] process 0 says {cut}",
        f"[0] process 0 says {folder}/3: torn checkpoint passed over (another process can't read it)",
        "[1] process 1 has step 1 {'step': 1} [12.0, 13.0] [1]",
        f"[1] process 1 says {cut}",
        f"[1] process 1 says {folder}/3: torn checkpoint passed over (it can't be read: OSError: no such device)",
    ]
