"""Training on SmolLM2-135M: SFT step, reward model steps and a whole PPO iteration, ours against peers.

    make bench
    .venv/bin/python tests/benchmarks/bench_training.py [--workloads sft] [--cores 2] [--dtype bfloat16] [--quick]

SFT and reward model steps against transformers on torch and Tunix's trainer; PPO against Tunix's learner with its own
rollout (`training_tasks.py`). SFT and reward model steps of ours come several to a call (`steps_per_call`), and one by
one for comparison. Seconds of whole steps, compilation apart; first losses are compared, so that all train
the same model on the same rows; our PPO iteration also part by part; peak memory of each process. With `--dtype
bfloat16` matrices are multiplied in it: ours and torch's (autocast) keep parameters and optimizer in float32, Tunix has
one dtype for everything. Writes bench_results/training.json and training.png (training-bfloat16), which git ignores.
"""

import statistics
from typing import Any

from harness import MODEL, WORK, facts, fresh_work_folder, options, run_worker, say, write_results
from plots import plot_training
from training_tasks import STEPS_PER_CALL, TASKS, sizes

PEERS = {"torch": ("sft", "reward", "pairs"), "tunix": ("sft", "reward", "pairs", "ppo")}
GOALS = {"sft": 1.25, "reward": 1.25, "ppo": 1.5}
# Losses before the first update may differ by rounding.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


def main() -> None:
    """Measure, print, write."""
    given = options(__doc__ or "", TASKS)
    fresh_work_folder()
    base = {"model": str(MODEL), "work": str(WORK), "quick": given.quick, "repeats": given.repeats}
    base["dtype"] = given.dtype
    base |= run_worker("prepare.py", base, max(given.cores), "prepare")
    results: dict[str, Any] = {
        "benchmark": "training",
        **facts(),
        "dtype": given.dtype,
        "quick": given.quick,
        "sizes": sizes(given.quick).__dict__,
        "by_cores": {},
    }
    for cores in given.cores:
        say(f"training in {given.dtype} on {cores} core{'s' * (cores > 1)}")
        found = results["by_cores"][str(cores)] = {}
        for task in given.workloads:
            found[task] = measure(base, task, cores, given.ours_only)
            show(task, found[task])
            path = write_results(results)
    plot = plot_training(results, path.with_suffix(".png"))
    say(f"written: {path}, {plot}")


def measure(base: dict[str, Any], task: str, cores: int, ours_only: bool) -> dict[str, Any]:
    """A task by everyone, each in its own process."""
    peers = [] if ours_only else [name for name, tasks in PEERS.items() if task in tasks]
    engines = {
        name: run_worker(f"train_{name}.py", {**base, "task": task}, cores, f"{task}_{name}_{cores}")
        for name in ("ours", *peers)
    }
    first = {name: engine["losses"][0] for name, engine in engines.items() if "losses" in engine}
    for name, loss in first.items():
        if not abs(loss - first["ours"]) <= LOSS_TOLERANCE[base["dtype"]]:
            raise RuntimeError(f"{task}: the first loss of {name} is {loss}, ours {first['ours']}: not the same step")
    # Steps on the same rows take the same time but for noise; those on others do not.
    middle = statistics.fmean if task == "pairs" else statistics.median
    seconds = {name: middle(engine["seconds"]) for name, engine in engines.items()}
    found: dict[str, Any] = {"engines": engines, "seconds": seconds, "first_losses": first}
    others = {name: value for name, value in seconds.items() if name != "ours"}
    if others:
        best = min(others, key=others.__getitem__)
        found |= {"ratio_to": best, "ratio": others[best] / seconds["ours"], "goal": GOALS.get(task)}
    return found


def show(task: str, found: dict[str, Any]) -> None:
    """Print a task's figures."""
    told = ", ".join(
        f"{name} {seconds:.2f} s ({found['engines'][name]['peak_gb']:.1f} GB)"
        for name, seconds in found["seconds"].items()
    )
    goal = f" (goal {found['goal']})" if found.get("goal") else ""
    ratio = f"; {found['ratio']:.2f} x {found['ratio_to']}{goal}" if "ratio" in found else ""
    say(f"  {task:8} {told}{ratio}")
    alone = found["engines"]["ours"].get("one_by_one")
    if alone:
        say(f"  {'':8} ours: {STEPS_PER_CALL} steps a call; one by one {statistics.median(alone):.2f} s")
    phases = found["engines"]["ours"].get("phases")
    if phases:
        say(f"  {'':8} ours: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))


if __name__ == "__main__":
    main()
