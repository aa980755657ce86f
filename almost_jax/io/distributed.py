"""Several processes as one program: on a TPU pod by itself, elsewhere from the environment."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax

from almost_jax.errors import InputError

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
