"""Worker: the sampling workloads by our engine, as the stages and `almost-jax generate` call it."""

import time
from typing import Any

import numpy as np
from harness import serve, warmed
from workloads import Workload, prompts, sampling_workloads

from almost_jax.config import MeshConfig, SamplingConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.io.models import Model, load_model
from almost_jax.sampling.engine import Request, Settings, generate
from almost_jax.sampling.rules import SamplingRules

# As in an experiment that sets neither.
_DEFAULTS = SamplingConfig()
STEPS_PER_WAKE, PREFILL_TOKENS = _DEFAULTS.steps_per_wake, _DEFAULTS.prefill_tokens


def run(model: Model, workload: Workload, text: np.ndarray, repeats: int) -> dict[str, Any]:
    """One workload; every sample is a request of its own."""
    shared, own = prompts(workload, text)
    limits = np.broadcast_to(np.array(workload.limits), len(own)).tolist()
    requests = [
        Request(f"{index}/{sample}", tuple(row), limits[index])
        for index, row in enumerate(own.tolist())
        for sample in range(workload.samples)
    ]
    rules = SamplingRules(workload.temperature, 1.0, 0, max(workload.limits), ())

    settings = Settings(workload.slots, STEPS_PER_WAKE, True, PREFILL_TOKENS)

    def call() -> list[tuple[int, ...]]:
        found = generate(
            model.params, model.config, requests, rules, settings, seed=0, prefix_tokens=shared.tolist()
        )
        return [done.tokens for done in found]

    done, found = warmed(call, repeats)
    assert sum(map(len, found)) == workload.new_tokens
    return {**done, "tokens": [list(tokens) for tokens in found]}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load and run."""
    start = time.perf_counter()
    model = load_model(spec["model"], make_mesh(MeshConfig()), "float32")
    loading = time.perf_counter() - start
    text = np.load(spec["text"])
    known = sampling_workloads(spec["quick"])
    return {
        "loading_seconds": loading,
        "workloads": {name: run(model, known[name], text, spec["repeats"]) for name in spec["workloads"]},
    }


if __name__ == "__main__":
    serve(main)
