"""Several processes as one program: on a TPU pod by itself, elsewhere from the environment.

All processes run the same stages in step, each computing with its own devices on its part of the global arrays. Process
0 alone writes records, and looks what is there and how far it has come, and tells the others (`from_primary`), so that
none of them can decide otherwise. Finished records and weights are read by all, and weights written by all, so the
folder of a run must lie on a file system that they share.
"""

import contextlib
import contextvars
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from almost_jax.errors import InputError, TrainingDiverged

T = TypeVar("T")

# Longer than process 0 may take for anything that the others wait for, a report say. A process that died is noticed
# earlier, by jax.distributed.
BARRIER_SECONDS = 24 * 3600

_barriers = itertools.count()

COORDINATOR, PROCESS_ID, NUM_PROCESSES = "ALMOST_COORDINATOR", "ALMOST_PROCESS_ID", "ALMOST_NUM_PROCESSES"


class Place(NamedTuple):
    """Where a process stands among the others: the coordinator's host:port, its own number, how many there are."""

    coordinator: str
    process_id: int
    num_processes: int


def initialize() -> None:
    """Join the other processes of this program, if there are any; call it before anything asks for devices.

    The environment decides where ALMOST_COORDINATOR (host:port of process 0), ALMOST_PROCESS_ID and
    ALMOST_NUM_PROCESSES are set (launch/local.sh sets them). Otherwise the hosts of a Cloud TPU slice find each other.
    Elsewhere, on a single host, and on a second call nothing happens.

    Raises:
        InputError: only some of the variables are set, or one has a value that can't be.
    """
    if jax.distributed.is_initialized():
        return
    place = read_place(os.environ)
    if place is not None:
        jax.distributed.initialize(
            place.coordinator, place.num_processes, place.process_id, cluster_detection_method="deactivate"
        )
    elif tpu_hosts() > 1:
        jax.distributed.initialize()


def read_place(environment: Mapping[str, str]) -> Place | None:
    """Where the environment puts this process; None when it says nothing.

    Raises:
        InputError: only some of the variables are set, or one has a value that can't be.
    """
    names = (COORDINATOR, PROCESS_ID, NUM_PROCESSES)
    missing = [name for name in names if not environment.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise InputError(f"{missing[0]} is not set, but {', '.join(n for n in names if n not in missing)} is; set all")
    coordinator = environment[COORDINATOR]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"{COORDINATOR}: {coordinator!r} should be HOST:PORT")
    for name in (PROCESS_ID, NUM_PROCESSES):
        if not environment[name].isdecimal():
            raise InputError(f"{name}: {environment[name]!r} should be a whole number")
    process_id, num_processes = int(environment[PROCESS_ID]), int(environment[NUM_PROCESSES])
    if process_id >= num_processes:
        raise InputError(f"{PROCESS_ID}: {process_id} should be below {NUM_PROCESSES}, which is {num_processes}")
    return Place(coordinator, process_id, num_processes)


def tpu_hosts() -> int:
    """How many hosts the Cloud TPU that this process runs on has; 1 when it runs on none."""
    platforms = jax.config.values["jax_platforms"]
    if platforms and "tpu" not in platforms.split(","):
        return 1
    # Private, but it is what jax.distributed.initialize() asks when called with nothing, and jax offers no other way to
    # ask without joining. Outside a TPU VM it answers without touching the network.
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster

    for cluster in (GceTpuCluster, GkeTpuCluster):
        if cluster.is_env_present():
            return cluster.get_process_count()
    return 1


def several() -> bool:
    """Whether this is one of several processes. Asks for no devices when it isn't."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process is the one that writes: the only one, or number 0."""
    return not several() or jax.process_index() == 0


_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def _without_others() -> Iterator[None]:
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def together() -> bool:
    """Whether the other processes are at the same point: there are some, and this isn't inside `from_primary`."""
    return several() and not _alone.get()


def wait_for_all() -> None:
    """A barrier of all processes at the coordinator; nothing when there is one, or inside `from_primary`."""
    if together():
        # A barrier has a name of its own; all processes come to the same ones, and so count alike.
        name = f"almost_jax {next(_barriers)}"
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_SECONDS * 1000)


def from_primary(read: Callable[[], T]) -> T:
    """What process 0 finds, on every process; the others wait and don't call `read`.

    All processes must come here. Inside `read`, process 0 is on its own: reads, writes and barriers concern nobody
    else.

    Args:
        read: gives something that can be pickled.

    Raises:
        InputError, TrainingDiverged, OSError, SystemExit: what `read` raised, on every process (of the system's errors
            the number, the text and the file).
        RuntimeError: on the others, when it raised anything else, which process 0 raises.
    """
    if not together():
        return read()
    value: Any = None
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            with _without_others():
                value = read()
        except BaseException as raised:
            error = raised
    told = error
    if isinstance(error, OSError) and error.errno is not None:
        # Not as it is: those of libraries needn't go through pickle.
        told = OSError(error.errno, error.strerror, error.filename)
    elif error is not None and not isinstance(error, (InputError, TrainingDiverged, SystemExit)):
        told = RuntimeError(f"process 0: {type(error).__name__}: {error}")
    # Process 0 may take long, and collectives on a CPU wait half an hour at most; a barrier has its own limit.
    wait_for_all()
    value, told = pickle.loads(_broadcast(pickle.dumps((value, told))))
    if error is not None:
        raise error
    if told is not None:
        raise told
    return value


def on_all(holds: bool) -> bool:
    """Whether something holds on every process; all must come here."""
    if not together():
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds)).all())


def _broadcast(data: bytes) -> bytes:
    """The bytes of process 0."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # Rounded up, so that few sizes are compiled.
    room = np.zeros((1 << max(size - 1, 1).bit_length(),), np.uint8)
    if jax.process_index() == 0:
        room[:size] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))[:size])
