"""Compile one program for one topology and print what the compiler says of it, as one line of JSON.

    python -m almost_jax.plan.worker TOPOLOGY PROGRAM < experiment.json

Runs in a process of its own: libtpu is loaded here alone, and several compile at a time.
"""

import contextlib
import json
import re
import sys
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from almost_jax.config import ExperimentConfig
from almost_jax.core.partitioning import exact_products, lowering_for, make_mesh, make_sampling_mesh
from almost_jax.errors import InputError
from almost_jax.plan.flops import count_flops
from almost_jax.plan.hlo import Traffic, collectives
from almost_jax.plan.programs import Program, build, samples
from almost_jax.plan.reads import read_bytes
from almost_jax.plan.topologies import Topology, parse_topology


def topology_mesh(topology: Topology, config: ExperimentConfig, name: str) -> Mesh:
    """The mesh on which an experiment runs a program, over the chips of a topology that needs not be there.

    Raises:
        InputError: the mesh has another number of devices, or can't be laid onto the chips.
    """
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except Exception as error:  # libtpu raises many kinds
        raise InputError(f"topology {topology.name!r}: libtpu refuses it ({_line(error)})") from error
    devices = list(described.devices)
    try:
        if config.mesh.sampling is not None and samples(name):
            return make_sampling_mesh(config.mesh.sampling, devices)
        return make_mesh(config.mesh, devices)
    except ValueError as error:
        raise InputError(f"mesh on {topology.name}: {_line(error)}") from error


def examine(config: ExperimentConfig, topology: Topology, name: str) -> dict[str, Any]:
    """Compile a program; the figures that `plan` reports of it.

    Returns:
        "name", "fits", "peak_bytes" of the program, "beside_bytes" of what lies there besides, "argument_bytes",
        "temp_bytes", "memory" (parameters, optimizer, cache, rest),
        "read_bytes" of a call and "read_bound_bytes" below which it can't be, "flops" (of all chips), "collectives",
        "floor_seconds", "mesh", "warnings", "knobs"; all bytes of one chip.
    """
    mesh = topology_mesh(topology, config, name)
    with lowering_for("tpu"), exact_products(config.compute_dtype):
        try:
            program = build(config, mesh, name)
        except ValueError as error:
            raise InputError(f"{name} on {topology.name}: {_line(error)}") from error
        with jax.set_mesh(mesh):
            traced = program.function.trace(*program.arguments)
            flops = count_flops(traced.jaxpr)
            lowered = traced.lower()
    split = {"parameters": program.parameters, "optimizer": program.optimizer, "cache": program.cache}
    chip = topology.chip
    # Every parameter and every key and value once, an optimizer's moments out and in again.
    bound = program.parameters + program.cache + 2 * program.optimizer
    floor = max(flops / topology.chips / chip.peak_flops, bound / chip.bandwidth)
    report: dict[str, Any] = {
        "name": name, "mesh": dict(mesh.shape), "flops": flops, "floor_seconds": floor, "read_bound_bytes": bound,
        "knobs": list(program.knobs), "beside_bytes": program.beside,
    }  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return report | {
            "fits": False, "peak_bytes": needed, "argument_bytes": None, "temp_bytes": None, "memory": split,
            "read_bytes": None, "collectives": {}, "warnings": [],
        }  # fmt: skip
    memory = compiled.memory_analysis()
    peak = int(memory.peak_memory_in_bytes)
    unread = []
    try:
        text = compiled.as_text()
        moved, read = collectives(text), read_bytes(text)
    except jax.errors.JaxRuntimeError as error:
        # Seen on v5p and v6e with libtpu 0.0.52: the program compiles, but its text can't be made of it.
        moved, read = collectives(""), None
        unread.append(f"the compiler can't print this program: its collectives are unknown ({_line(error)})")
    return report | {
        "fits": peak + program.beside <= chip.memory_bytes,
        "peak_bytes": peak,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "memory": split | {"rest": peak - sum(split.values())},
        "read_bytes": read,
        "collectives": {kind: vars(traffic) for kind, traffic in moved.items()},
        "warnings": unread + warnings(config, program, moved, mesh, read, int(memory.argument_size_in_bytes)),
    }


def warnings(
    config: ExperimentConfig, program: Program, moved: dict[str, Traffic], mesh: Mesh, read: int | None,
    arguments: int,
) -> list[str]:  # fmt: skip
    """What is legal but likely not meant."""
    found = []
    trains = program.optimizer > 0
    # Norm scales are reduced whole either way; what counts is what comes near a gradient of every matrix.
    if trains and not config.mesh.explicit and moved["all-reduce"].bytes > max(program.parameters, 2**27):
        found.append(
            f"{moved['all-reduce'].bytes / 1e9:.1f} GB are all-reduced a step; mesh.explicit reduce-scatters gradients"
        )
    if trains and config.mesh.explicit and config.mesh.gradient_dtype == "bfloat16":
        found.append("gradients are summed over chips in bfloat16 (mesh.gradient_dtype)")
    if program.cache and config.mesh.sampling is None and moved["all-gather"].bytes > program.parameters:
        found.append(
            f"{moved['all-gather'].bytes / 1e9:.1f} GB are gathered for each call, weights mostly: to sample, give "
            "mesh.sampling"
        )
    decodes = program.name.startswith("decode_")
    if decodes and read is not None and read > 1.2 * (program.parameters + program.cache):
        found.append(
            f"a step reads {read / 1e9:.1f} GB, {read / (program.parameters + program.cache):.2f} times weights and "
            "cache: the compiler copies the cache, or parts of it, into another layout"
        )
    content = program.parameters + program.optimizer + program.cache
    if arguments > 1.05 * content + 2**26:
        found.append(
            f"arguments take {arguments / 1e9:.2f} GB for {content / 1e9:.2f} GB of content: parts that don't fill the "
            "chip's tiles (8 x 128) are padded, heads of 64 say, or dimensions split too finely"
        )
    tensor = mesh.shape["tensor"]
    if program.cache and program.kv_heads % tensor:
        found.append(
            f"{program.kv_heads} key/value heads can't be split over tensor {tensor}: the cache is whole on each of "
            "its chips"
        )
    if program.heads % tensor:
        padded = -(-program.heads // tensor) * tensor
        found.append(
            f"{program.heads} heads over tensor {tensor} are padded to {padded}: {padded / program.heads - 1:.0%} of "
            "attention's work is for nothing"
        )
    return found


def _needed(message: str) -> int | None:
    """The bytes that a program would have needed, from the compiler's out-of-memory message."""
    if "RESOURCE_EXHAUSTED" not in message and "exceeds" not in message:
        return None
    sizes = [float(size) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit]
             for size, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]  # fmt: skip
    return int(max(sizes)) if sizes else None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def main() -> None:
    """The process."""
    topology, name = parse_topology(sys.argv[1]), sys.argv[2]
    config = ExperimentConfig.model_validate(json.load(sys.stdin))
    try:
        # What libraries print must not mix with the answer.
        with contextlib.redirect_stdout(sys.stderr):
            report = examine(config, topology, name)
    except InputError as error:
        report = {"name": name, "error": str(error)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
