"""Sampling on SmolLM2-135M: our engine, transformers and Tunix on the same machine in the same run.

    make bench
    .venv/bin/python tests/benchmarks/bench_sampling.py [--workloads separate] [--cores 1] [--dtype bfloat16]

Four workloads (see `workloads.py`), each on every core count: tokens a second over whole calls, compilation apart; the
ratio to the better peer; the share of the floor that the machine's rates, measured in the same run, allow (`floor.py`).
`ragged` compares our engine with itself without refill; `best_of_4` is compared with four passes of transformers, and
its one call for four sequences stands beside. All run the same weights (their logits are compared with ours first), and
greedy tokens are compared with transformers'. Everyone computes in float32, or in bfloat16 where asked to. Writes
bench_results/sampling.json and sampling.png (sampling-bfloat16), which git ignores.
"""

import statistics
from typing import Any

from floor import FLOAT_BYTES, floor_seconds
from harness import MODEL, WORK, facts, fresh_work_folder, options, run_worker, say, write_results
from plots import plot_sampling
from workloads import Workload, sampling_workloads

# Which workloads each peer runs.
PEERS = {"transformers": ("shared_prefix", "separate", "best_of_4"), "tunix": ("shared_prefix", "separate")}
# Logits may differ from ours in float32 by rounding; beyond this it is another model. In bfloat16 single logits are off
# by two (our own by 1.8), and all of them on average by little.
LOGITS_TOLERANCE = {
    "float32": ("logits_difference", 1e-3),
    "bfloat16": ("mean_logits_difference", 0.3),
}
# What is compared with what, and by how much ours is to lead.
GOALS = {"shared_prefix": 9.0, "separate": 1.7, "ragged": 1.5, "best_of_4": 3.0}


def main() -> None:
    """Measure, print, write."""
    known = sampling_workloads(False)
    given = options(__doc__ or "", list(known))
    known = sampling_workloads(given.quick)
    fresh_work_folder()
    base = {"model": str(MODEL), "work": str(WORK), "quick": given.quick, "repeats": given.repeats}
    base["dtype"] = given.dtype
    base |= run_worker("prepare.py", base, max(given.cores), "prepare")
    results: dict[str, Any] = {
        "benchmark": "sampling",
        **facts(),
        "dtype": given.dtype,
        "quick": given.quick,
        "workloads": {name: known[name].__dict__ for name in given.workloads},
        "by_cores": {},
    }
    for cores in given.cores:
        say(f"sampling in {given.dtype} on {cores} core{'s' * (cores > 1)}")
        results["by_cores"][str(cores)] = measure(base, cores, given.workloads, given.ours_only, known)
        show(results["by_cores"][str(cores)], given.workloads, cores)
        path = write_results(results)
    plot = plot_sampling(results, path.with_suffix(".png"))
    say(f"written: {path}, {plot}")


def measure(
    base: dict[str, Any], cores: int, names: list[str], ours_only: bool, known: dict[str, Workload]
) -> dict[str, Any]:
    """Floor, ours and peers on so many cores, each in its own process."""
    rates = run_worker("floor.py", base, cores, f"floor_{cores}")
    engines = {"ours": run_worker("sample_ours.py", {**base, "workloads": names}, cores, f"ours_{cores}")}
    for peer, runs in PEERS.items():
        wanted = [name for name in names if name in runs]
        if wanted and not ours_only:
            spec = {**base, "workloads": wanted}
            engines[peer] = run_worker(f"sample_{peer}.py", spec, cores, f"{peer}_{cores}")
            name, most = LOGITS_TOLERANCE[base["dtype"]]
            difference = engines[peer][name]
            if not difference <= most:
                raise RuntimeError(f"{peer}: logits differ from ours by {difference}: not the same model")
    equal = equal_tokens(engines, "separate")
    found = {"floor": rates, "engines": engines, "compared": {}, "greedy_tokens_equal": equal}
    for name in names:
        found["compared"][name] = compare(known[name], base["shape"], rates, engines, base["dtype"])
    for engine in engines.values():
        for figures in engine["workloads"].values():
            figures.pop("tokens", None)
    return found


def compare(
    workload: Workload, shape: dict[str, int], rates: dict[str, float], engines: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Tokens a second of everyone on a workload, the ratio to the better other, and the share of the floor."""

    def rate(seconds: list[float]) -> float:
        return workload.new_tokens / statistics.median(seconds)

    figures = {name: engine["workloads"].get(workload.name) for name, engine in engines.items()}
    speeds = {name: rate(own["seconds"]) for name, own in figures.items() if own}
    others = {name: speed for name, speed in speeds.items() if name != "ours"}
    without_refill = (figures["ours"] or {}).get("without_refill_seconds")
    if without_refill:
        others["ours without refill"] = rate(without_refill)
    floor = workload.new_tokens / floor_seconds(workload, shape, rates, FLOAT_BYTES[dtype])
    compared: dict[str, Any] = {
        "tokens_per_second": speeds | others,
        "floor_tokens_per_second": floor,
        "share_of_floor": speeds["ours"] / floor,
        "compile_seconds": {
            name: own["first_seconds"] - statistics.median(own["seconds"])
            for name, own in figures.items()
            if own and "first_seconds" in own
        },
    }
    if others:
        compared["ratio_to"] = max(others, key=others.__getitem__)
        compared["ratio"] = speeds["ours"] / others[compared["ratio_to"]]
        compared["goal"] = GOALS[workload.name]
    one_call = (figures.get("transformers") or {}).get("one_call_seconds")
    if one_call:
        compared["tokens_per_second"]["transformers, one call"] = rate(one_call)
    return compared


def equal_tokens(engines: dict[str, Any], name: str) -> str | None:
    """How many rows of a greedy workload are transformers' to the token; None when it didn't run."""
    rows = [engine["workloads"].get(name, {}).get("tokens") for engine in engines.values()]
    named = dict(zip(engines, rows, strict=True))
    if not named.get("ours") or not named.get("transformers"):
        return None
    same = sum(a == b for a, b in zip(named["ours"], named["transformers"], strict=True))
    return f"{same} of {len(named['ours'])} rows"


def show(found: dict[str, Any], names: list[str], cores: int) -> None:
    """Print a core count's figures."""
    rates = found["floor"]
    say(
        f"  machine: {rates['gflops']:.0f} GFLOP/s ({rates['gflops_by']}), "
        f"{rates['gb_per_second']:.1f} GB/s ({rates['gb_per_second_by']})"
    )
    for name in names:
        own = found["compared"][name]
        speeds = ", ".join(f"{who} {speed:.1f}" for who, speed in own["tokens_per_second"].items())
        line = f"  {name:14} {speeds} tokens/s; floor {own['floor_tokens_per_second']:.0f}"
        line += f", of which ours {own['share_of_floor']:.0%}"
        if "ratio" in own:
            line += f"; {own['ratio']:.2f} x {own['ratio_to']} (goal {own['goal']})"
        say(line)
    if found["greedy_tokens_equal"]:
        say(f"  greedy tokens of `separate` equal to transformers': {found['greedy_tokens_equal']}")
    for peer, engine in found["engines"].items():
        extra = f", logits differ by {engine['logits_difference']:.1e}" if "logits_difference" in engine else ""
        say(f"  {peer}: peak {engine['peak_gb']:.1f} GB{extra}")


if __name__ == "__main__":
    main()
