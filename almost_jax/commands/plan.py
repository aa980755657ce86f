"""`almost-jax plan`: compile the main programs of an experiment for a TPU that isn't there."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import almost_jax
from almost_jax.commands.places import on_disk
from almost_jax.config import ExperimentConfig
from almost_jax.errors import InputError
from almost_jax.experiments import load_experiment
from almost_jax.plan.programs import program_names
from almost_jax.plan.shapes import model_shape
from almost_jax.plan.topologies import Topology, parse_topology, quiet_environment

DOES_NOT_FIT = 1
# Meshes that --sweep tries for the training steps: what changes in the experiment.
_MICRO_BATCHES = (1, 2, 4)
_GB = 1e9


def plan_command(
    experiment: Annotated[
        Path, typer.Argument(help="The experiment's yaml file.", metavar="EXPERIMENT", callback=on_disk)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to change, as in mesh.fsdp=16.", metavar="[a.b=v]...")
    ] = None,
    topology: Annotated[str, typer.Option(help="KIND:SHAPE, as in v5e:8x8.")] = "v5e:8x8",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    only: Annotated[str | None, typer.Option(help="Programs to compile, separated by commas.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Try meshes and micro-batches for the SFT step.")] = False,
    jobs: Annotated[int, typer.Option(help="Programs compiled at a time.", min=1)] = max((os.cpu_count() or 2) // 2, 1),
) -> None:
    """Compile the main programs of an experiment for a TPU topology: what fits, what travels, and floors of time.

    Needs libtpu (`pip install -e '.[tpu]'`), no TPU. Exits 1 when a program doesn't fit. Floors are what peak rates
    allow at best; they are no predictions.
    """
    config = load_experiment(experiment, overrides or [])
    where = parse_topology(topology)
    _check_libtpu()
    console = Console(stderr=True)
    if sweep:
        points = _sweep_points(config, where)
        jobs_of = [(f"{label}: sft_step", point, "sft_step") for label, point in points]
    else:
        names = program_names(config)
        chosen = [name.strip() for name in only.split(",")] if only else names
        for name in chosen:
            if name not in names:
                raise InputError(f"--only {name!r}: this experiment's programs are {', '.join(names)}")
        jobs_of = [(name, config, name) for name in chosen]
    reports = compile_all(jobs_of, where, jobs, console)
    if as_json:
        print(json.dumps({"topology": where.name, "programs": reports}, indent=1))
    else:
        _show(Console(), where, reports)
    if sweep:
        _propose(console, reports)
    if not all(report["fits"] for report in reports) and not (sweep and any(report["fits"] for report in reports)):
        raise typer.Exit(DOES_NOT_FIT)


def compile_all(
    wanted: list[tuple[str, ExperimentConfig, str]], topology: Topology, jobs: int, console: Console
) -> list[dict[str, Any]]:
    """Compile programs in processes of their own, or take their reports from the cache.

    Args:
        wanted: label, experiment and program of each.
        topology: what to compile for.
        jobs: processes at a time.
        console: where the progress bar goes.

    Returns:
        The reports in order, see `worker.examine`; "name" is the label.

    Raises:
        InputError: a program can't be built for that topology.
    """
    reports: dict[int, dict[str, Any]] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(f"compiling for {topology.name}", total=len(wanted), last="")
        running = {
            pool.submit(_compile, config, topology, name): index for index, (_, config, name) in enumerate(wanted)
        }
        try:
            for finished in as_completed(running):
                index = running[finished]
                reports[index] = finished.result() | {"name": wanted[index][0]}
                progress.update(task, advance=1, last=wanted[index][0])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [reports[index] for index in range(len(wanted))]


def _compile(config: ExperimentConfig, topology: Topology, name: str) -> dict[str, Any]:
    text = config.model_dump_json()
    place = _cache_folder() / f"{_key(text, _shapes(config), topology, name)}.json"
    if place.is_file():
        found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return found
    done = subprocess.run(
        [sys.executable, "-m", "almost_jax.plan.worker", topology.name, name],
        input=text, capture_output=True, text=True, env=quiet_environment(), check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"plan: {name} can't be compiled for {topology.name}: {last[:400]}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in report:
        raise InputError(f"plan: {name}: {report['error']}")
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(report), encoding="utf-8")
    temporary.replace(place)
    return report


def _shapes(config: ExperimentConfig) -> list[str]:
    """The shapes of the experiment's models, since a folder of the same name may hold another one by now."""
    found = []
    for key, source in sorted(config.models.items()):
        # A model that a program doesn't use may be of no known shape.
        with contextlib.suppress(InputError):
            found.append(f"{key} {model_shape(f'models.{key}', source)}")
    return found


def _key(config: str, shapes: list[str], topology: Topology, name: str) -> str:
    """What a report depends on: experiment, models, topology, program, our sources, and the compiler's versions."""
    digest = hashlib.sha256("\0".join([config, *shapes, topology.name, name]).encode())
    for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        digest.update(importlib.metadata.version(package).encode())
    root = Path(almost_jax.__file__).parent
    for folder in ("core", "plan", "sampling", "stages"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "almost_jax" / "plan"


def _check_libtpu() -> None:
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("plan: needs the TPU compiler, libtpu: pip install -e '.[tpu]' in its source") from None


def _sweep_points(config: ExperimentConfig, topology: Topology) -> list[tuple[str, ExperimentConfig]]:
    """Meshes of the topology's physical axes, each with some numbers of micro-batches that divide the batch."""
    first, rest = topology.shape[0], topology.chips // topology.shape[0]
    meshes = [
        {"data": 1, "fsdp": topology.chips, "tensor": 1, "explicit": False},
        {"data": first, "fsdp": rest, "tensor": 1, "explicit": False},
        {"data": first, "fsdp": rest, "tensor": 1, "explicit": True},
        {"data": 1, "fsdp": first, "tensor": rest, "explicit": False},
    ]
    points = []
    for mesh in meshes:
        for micro in _MICRO_BATCHES:
            rows = config.sft.training.batch_size // micro
            if config.sft.training.batch_size % micro or rows % (mesh["data"] * mesh["fsdp"]):
                continue
            fields = config.model_dump()
            fields["mesh"] |= mesh
            if not mesh["explicit"]:
                # The compiler's sums.
                fields["mesh"]["gradient_dtype"] = "float32"
            fields["sft"]["training"]["micro_batches"] = micro
            label = " ".join(f"{key}={value}" for key, value in mesh.items())
            points.append((f"{label} micro_batches={micro}", ExperimentConfig.model_validate(fields)))
    if not points:
        raise InputError(
            f"plan --sweep: sft.training.batch_size {config.sft.training.batch_size} can't be split over "
            f"{topology.chips} chips; use a multiple"
        )
    return points


def _show(console: Console, topology: Topology, reports: list[dict[str, Any]]) -> None:
    usable = topology.chip.memory_bytes
    console = Console(width=max(console.width, 140))
    table = Table(title=f"{topology.name}: {usable / _GB:.1f} GB usable a chip", title_justify="left")
    for heading in ("program", "fits", "peak GB", "beside GB", "parameters", "optimizer", "cache", "gathered GB",
                    "reduced GB", "of it scattered", "floor s"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("program", "fits") else "right", no_wrap=True)
    for report in reports:
        moved, memory = report["collectives"], report["memory"]
        scattered = moved.get("reduce-scatter", {}).get("bytes", 0)
        reduced = scattered + moved.get("all-reduce", {}).get("bytes", 0)
        table.add_row(
            report["name"], "yes" if report["fits"] else "NO", f"{report['peak_bytes'] / _GB:.2f}",
            f"{report['beside_bytes'] / _GB:.2f}",
            *(f"{memory[part] / _GB:.2f}" for part in ("parameters", "optimizer", "cache")),
            f"{moved.get('all-gather', {}).get('bytes', 0) / _GB:.1f}", f"{reduced / _GB:.1f}",
            f"{scattered / reduced:.0%}" if reduced else "-", f"{report['floor_seconds']:.3g}",
        )  # fmt: skip
    console.print(table)
    console.print("Floors are what peak rates allow at best; nothing here was timed.")
    for report in reports:
        if not report["fits"]:
            over = (report["peak_bytes"] + report["beside_bytes"] - usable) / _GB
            knobs = ", ".join(report["knobs"])
            console.print(f"{report['name']} needs {over:.1f} GB more than a chip has; try {knobs}")
        for warning in report["warnings"]:
            console.print(f"{report['name']}: {warning}")


def _propose(console: Console, reports: list[dict[str, Any]]) -> None:
    """Of what fits, the fewest micro-batches; then the least memory."""
    fitting = [report for report in reports if report["fits"]]
    if not fitting:
        console.print("none of these fits")
        return

    def worth(report: dict[str, Any]) -> tuple[int, int]:
        micro = int(report["name"].split("micro_batches=")[1].split(":")[0])
        return micro, report["peak_bytes"]

    best = min(fitting, key=worth)
    console.print(f"best that fits: {best['name']} ({best['peak_bytes'] / _GB:.2f} GB a chip)")
