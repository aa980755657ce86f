"""What the benchmarks against others share: worker processes pinned to cores, timing, and results on disk.

Every engine runs in a process of its own for every core count, one after the other, so that memory, thread pools and
compiled programs don't mix. A worker reads a JSON file (`spec`) and writes one; what it prints goes to a log.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "bench_results"
WORK = RESULTS / "work"
LOGS = RESULTS / "logs"
MODEL = Path(os.environ.get("BENCH_MODEL", ROOT / "models" / "smollm2-135m"))
# Tunix asks for an older safetensors than ours, so it stands in a folder of its own, which only its workers see.
TUNIX = Path(os.environ.get("BENCH_TUNIX", Path(sys.prefix) / "tunix"))
WORKER_SECONDS = 1800
# Above this share of the processor's work by other processes, a run says that its times can't be trusted.
MOST_OTHERS = 0.1
DTYPES = ("float32", "bfloat16")
VERSIONS = ("jax", "flax", "optax", "numpy", "torch", "transformers")


def options(description: str, workloads: Sequence[str]) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=list(workloads))
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2], help="core counts, one after the other")
    parser.add_argument("--repeats", type=int, default=1, help="how often everything is timed")
    parser.add_argument("--ours-only", action="store_true", help="leave the peers out")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="what everyone computes in")
    parser.add_argument("--quick", action="store_true", help="smaller workloads")
    given = parser.parse_args()
    have = len(os.sched_getaffinity(0))
    too_many = [cores for cores in given.cores if not 1 <= cores <= have]
    if too_many:
        parser.error(f"--cores {too_many[0]}: this process may use {have} cores, so give 1 to {have}")
    if not MODEL.is_dir():
        parser.error(f"{MODEL} is missing: run `make smollm2` first")
    if not given.ours_only and not TUNIX.is_dir():
        parser.error(f"{TUNIX} is missing: `make bench` sets it up; or give --ours-only")
    return given


def run_worker(script: str, spec: dict[str, Any], cores: int, label: str) -> dict[str, Any]:
    """Run a worker on the first `cores` of this process's cores.

    Args:
        script: a file of this folder.
        spec: what the worker is to do.
        cores: how many cores it may use; its libraries are told so too.
        label: names its log.

    Returns:
        What it wrote, with `peak_gb`, its largest resident memory, and `others_share`, the share of the processor's
        work that was other processes'.

    Raises:
        RuntimeError: it failed; the message holds the end of its log.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    asked, answer, log = WORK / f"{label}.spec.json", WORK / f"{label}.json", LOGS / f"{label}.log"
    asked.write_text(json.dumps({**spec, "cores": cores}))
    answer.unlink(missing_ok=True)
    paths = [str(ROOT), *([str(TUNIX)] if "tunix" in script else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(cores),
        "MKL_NUM_THREADS": str(cores),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Persistent caches would hide what compilation costs.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    say(f"  {label} ...")
    before = _processor_seconds()
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, str(HERE / script), str(asked), str(answer)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=WORKER_SECONDS,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
    if done.returncode or not answer.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{label} ended with {done.returncode}; the end of {log}:\n{tail}")
    found: dict[str, Any] = json.loads(answer.read_text())
    total, own = (after - start for after, start in zip(_processor_seconds(), before, strict=True))
    found["others_share"] = round(max(total - own, 0.0) / total, 3) if total else 0.0
    if found["others_share"] > MOST_OTHERS and script != "prepare.py":
        say(f"  {label}: other processes did {found['others_share']:.0%} of the work meanwhile; don't trust its times")
    return found


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The main function of a worker: read the spec, work, write the answer and the peak of memory."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    answer = work(spec)
    # Kilobytes on Linux.
    answer["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    Path(sys.argv[2]).write_text(json.dumps(answer))


def timed(call: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each call, and what the last one returned (which must be on the host)."""
    seconds, found = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
    return seconds, found


def warmed(call: Callable[[], Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """Call once to compile, then time: {"first_seconds", "seconds"}, and what the last call returned."""
    first, _ = timed(call, 1)
    seconds, found = timed(call, repeats)
    return {"first_seconds": first[0], "seconds": seconds}, found


def fresh_work_folder() -> None:
    """Empty the folder that this run's workers share."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)


def facts() -> dict[str, Any]:
    """When, where and with which versions a run was made."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {name: metadata.version(name) for name in VERSIONS if _installed(name)}
    tunix = sorted(TUNIX.glob("google_tunix-*.dist-info"))
    if tunix:
        versions["google-tunix"] = tunix[0].name.split("-")[1].removesuffix(".dist")
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit,
        "versions": versions,
        "model": str(MODEL.name),
    }


def logits_differences(found: Any, reference: Any) -> dict[str, float]:
    """The largest and the mean absolute difference between an engine's logits and ours in float32, two arrays."""
    difference = abs(found - reference)
    return {"logits_difference": float(difference.max()), "mean_logits_difference": float(difference.mean())}


def write_results(results: dict[str, Any]) -> Path:
    """Write bench_results/BENCHMARK.json, or BENCHMARK-bfloat16.json."""
    RESULTS.mkdir(exist_ok=True)
    suffix = "" if results["dtype"] == DTYPES[0] else f"-{results['dtype']}"
    path = RESULTS / f"{results['benchmark']}{suffix}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def say(line: str) -> None:
    """A line of progress or of a table."""
    print(line, flush=True)


def _processor_seconds() -> tuple[float, float]:
    """Seconds that all cores have worked since the machine started, and those of this process's ended children."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, *_ = fields
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
