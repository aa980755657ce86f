"""almost-jax doctor: whether this machine can run what is asked of it, and whether a model and its tokenizer hold what
every stage relies on.
"""

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import jax
import typer

from almost_jax.commands import invariants
from almost_jax.commands.invariants import DEVICES, Check
from almost_jax.commands.places import one_device
from almost_jax.core.heads import HEAD
from almost_jax.errors import InputError
from almost_jax.folder import VERSIONS_OF
from almost_jax.io.models import Model, load_model
from almost_jax.io.transfer import locate

PYTHON = (3, 11)
GIB = 2**30
# Whole copies of a model's weights that statement 5 holds at once, spread over fake devices of one machine: parameters
# and gradients of two meshes, and what a device gathers of them.
COPIES_FOR_DEVICES = 8
# Below it a run of a small model fills the disk with checkpoints.
DISK_WANTED = 2 * GIB
FAILED = 1


def doctor_command(
    model: Annotated[
        str, typer.Option(help="A model of ours, a Hugging Face folder or hub name, or a GGUF file.")
    ] = "microworld:small",
    devices_only: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Check this machine, and a model with its tokenizer on it: one line each, with what to do where one fails."""
    if devices_only:
        # Asked by another doctor, of a process with more devices: one line of JSON.
        print(json.dumps(asdict(_on_devices(load_model(locate(model), one_device(), "float32")))))
        return
    failed, skipped = 0, 0
    for check in examine(model):
        skipped += check.outcome == "skipped"
        print(f"{check.outcome:8}{check.name}: {check.seen}", flush=True)
        if check.fix:
            print(f"{'':8}-> {check.fix}", flush=True)
        failed += check.outcome == "FAIL"
    left_out = f", {skipped} skipped" if skipped else ""
    print(f"{failed} failed{left_out}" if failed else f"all is well{left_out}")
    if failed:
        raise typer.Exit(FAILED)


def examine(source: str) -> Iterator[Check]:
    """Every check, in order; those of the model are left out where it can't be loaded or holds no numbers."""
    yield from environment()
    try:
        model = load_model(locate(source), one_device(), "float32")
    except InputError as error:
        yield Check("model", "FAIL", str(error), "give --model a folder, a hub name or a GGUF file of a LLaMA")
        return
    except Exception as error:
        yield _broken("model", error)
        return
    config = model.config
    shape = f"{config.num_layers} layers, {config.hidden_size} wide, {config.vocab_size:,} tokens"
    yield Check("model", "pass", f"{source}: {model.kind}, {shape}")
    yield invariants.check_tokenizer(model.tokenizer)
    yield invariants.check_stops(model.tokenizer)
    weights = invariants.check_weights(model)
    yield weights
    if weights.outcome == "FAIL":
        yield Check("3, 5, 7, 16", "skipped", "a model that isn't made of numbers computes none")
        return
    # A reward model's scalar head is none of the language model's business.
    model = replace(model, params={name: tree for name, tree in model.params.items() if name != HEAD})
    with jax.default_matmul_precision("highest"):
        for number, check in invariants.CHECKS.items():
            yield _guarded(str(number), functools.partial(check, model))
        yield _guarded("5", functools.partial(_devices, model, source))


def environment() -> Iterator[Check]:
    """Versions, devices and their memory, the machine's memory, the cache of compiled programs, the disk."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS_OF)
    python = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= PYTHON
    fix = "" if enough else f"install Python {'.'.join(map(str, PYTHON))} or newer, and the package anew"
    yield Check("versions", "pass" if enough else "FAIL", f"python {python}, {found}", fix)
    try:
        devices = jax.devices()
    except RuntimeError as error:
        yield _broken("devices", error)
        return
    limit = (devices[0].memory_stats() or {}).get("bytes_limit") if devices[0].platform != "cpu" else None
    each = f", {limit / GIB:.1f} GiB each" if limit else ""
    yield Check("devices", "pass", f"{len(devices)} {devices[0].device_kind} ({devices[0].platform}){each}")
    yield Check("memory", "pass", f"{memory_free() / GIB:.1f} GiB free on this machine, {os.cpu_count()} cores")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "almost_jax" / "jax"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
        size = sum(file.stat().st_size for file in cache.iterdir() if file.is_file())
        yield Check("compiled programs", "pass", f"kept in {cache}, {size / 2**20:.0f} MiB")
    except OSError as error:
        fix = "every run compiles anew: set XDG_CACHE_HOME to a folder that can be written to"
        yield Check("compiled programs", "FAIL", f"{cache}: {error.strerror}", fix)
    free = shutil.disk_usage(Path.cwd()).free
    fix = "" if free >= DISK_WANTED else "make room: a checkpoint holds a model and the optimizer's two moments of it"
    yield Check("disk", "pass" if not fix else "FAIL", f"{free / GIB:.1f} GiB free in {Path.cwd()}", fix)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """What a check says, or that it could not be made: the others go on."""
    try:
        return check()
    except Exception as error:
        return _broken(name, error)


def _broken(name: str, error: Exception) -> Check:
    """A check that ended by an error of a library's."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if "RESOURCE_EXHAUSTED" in said or isinstance(error, MemoryError):
        fix = "the model in float32 doesn't fit on one device: try a machine with more, or JAX_PLATFORMS=cpu"
    else:
        fix = "an error that nobody foresaw: please report it with this line"
    return Check(name, "FAIL", said, fix)


def memory_free() -> int:
    """Bytes of the machine's memory that are free now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _devices(model: Model, source: str) -> Check:
    """Statement 5 on the devices that there are; a single CPU takes eight fake ones, in a process of their own."""
    name = f"5 {DEVICES} devices are one device"
    if len(jax.devices()) > 1:
        return _on_devices(model)
    if jax.default_backend() != "cpu":
        return Check(name, "skipped", f"there is one {jax.devices()[0].device_kind}; run it where there are several")
    needed = COPIES_FOR_DEVICES * sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    if needed > memory_free():
        seen = f"{DEVICES} fake devices need about {needed / GIB:.1f} GiB, {memory_free() / GIB:.1f} GiB are free"
        return Check(name, "skipped", seen)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    command = [sys.executable, "-m", "almost_jax", "doctor", "--model", source, "--devices-only"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        return Check(**json.loads(ran.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (ran.stderr.strip().splitlines() or [f"it ended with code {ran.returncode}"])[-1]
        return Check(name, "FAIL", f"a process with {DEVICES} fake devices failed: {last}", f"run: {' '.join(command)}")


def _on_devices(model: Model) -> Check:
    model = replace(model, params={name: tree for name, tree in model.params.items() if name != HEAD})
    with jax.default_matmul_precision("highest"):
        return invariants.check_devices(model, jax.devices())
