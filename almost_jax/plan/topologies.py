"""TPU topologies by name, and what one chip of each kind has.

Usable memory is what the TPU compiler (libtpu 0.0.52) says in its out-of-memory errors. Peak rates are the vendor's
(cloud.google.com/tpu/docs, one page a generation).
"""

import dataclasses
import os
import re

from almost_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: usable memory in bytes, bfloat16 peak in flop/s, memory bandwidth in bytes/s."""

    memory_bytes: float
    peak_flops: float
    bandwidth: float
    dimensions: int


GIB = 2.0**30
CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1228e9, 3),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 2),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 3),
    "v6e": Chip(31.24 * GIB, 918e12, 1640e9, 2),
}
EXAMPLES = "v5e:8x8, v5e:4x4, v6e:4x4, v4:2x2x4, v5p:2x2x2"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named arrangement of chips."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What one of its chips has."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """How many."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def parse_topology(name: str) -> Topology:
    """Read "v5e:8x8".

    Raises:
        InputError: the name is no topology; the message lists some that are.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if match is None or match[1] not in CHIPS:
        raise InputError(f"topology {name!r}: expected KIND:SHAPE with a kind of {', '.join(CHIPS)}, as in {EXAMPLES}")
    shape = tuple(int(size) for size in match[2].split("x"))
    chip = CHIPS[match[1]]
    if len(shape) != chip.dimensions or 0 in shape:
        raise InputError(f"topology {name!r}: {match[1]} has {chip.dimensions} dimensions, as in {EXAMPLES}")
    return Topology(name, match[1], shape)


def quiet_environment() -> dict[str, str]:
    """Environment in which libtpu looks for no machine, says little, and may be loaded by several processes.

    Flags of the CPU's compiler are left out of XLA_FLAGS: libtpu ends a process that has one it doesn't know.
    """
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu_")]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
