"""Worker: the sampling workloads by our engine, with the settings that an experiment has if it names none."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import serve, warmed
from workloads import Workload, prompts, sampling_workloads

from almost_jax.config import MeshConfig, SamplingConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.io.models import Model, load_model
from almost_jax.sampling.engine import Request, generate
from almost_jax.sampling.stats import Stats
from almost_jax.stages.prompting import engine_settings, sampling_rules


def run(model: Model, workload: Workload, text: np.ndarray, repeats: int) -> dict[str, Any]:
    """One workload; where ends differ, once more without refill, each batch as long as its longest request."""
    shared, own = prompts(workload, text)
    requests = [
        Request(f"{index}/{sample}", tuple(row), max_new_tokens=limit)
        for index, (row, limit) in enumerate(zip(own.tolist(), workload.limits, strict=True))
        for sample in range(workload.samples)
    ]

    def sampler(refill: bool) -> Callable[[], tuple[list[tuple[int, ...]], dict[str, Any]]]:
        # The rest is what an experiment gets that says nothing of it.
        sampling = SamplingConfig(
            temperature=workload.temperature,
            max_new_tokens=max(workload.limits),
            batch_size=workload.slots,
            refill=refill,
        )

        def call() -> tuple[list[tuple[int, ...]], dict[str, Any]]:
            stats = Stats()
            found = generate(
                model.params, model.config, requests, sampling_rules(sampling, ()), engine_settings(sampling),
                seed=0, prefix_tokens=shared.tolist(), stats=stats,
            )  # fmt: skip
            return [done.tokens for done in found], stats.report()

        return call

    figures, (found, stats) = warmed(sampler(True), repeats)
    assert [len(tokens) for tokens in found] == [limit for limit in workload.limits for _ in range(workload.samples)]
    done = {**figures, "stats": stats, "tokens": [list(tokens) for tokens in found]}
    if len(set(workload.limits)) > 1:
        figures, (same, stats) = warmed(sampler(False), repeats)
        assert same == found, "what was drawn depends on refill"
        done |= {"without_refill_seconds": figures["seconds"], "without_refill_stats": stats}
    return done


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load and run."""
    start = time.perf_counter()
    model = load_model(spec["model"], make_mesh(MeshConfig()), spec["dtype"])
    loading = time.perf_counter() - start
    text = np.load(spec["text"])
    known = sampling_workloads(spec["quick"])
    return {
        "loading_seconds": loading,
        "workloads": {name: run(model, known[name], text, spec["repeats"]) for name in spec["workloads"]},
    }


if __name__ == "__main__":
    serve(main)
