"""Worker: the sampling workloads by Tunix's sampler, as its own rollouts call it: compiled, with its key-value cache.

Prompts are padded to their own length and not to the next power of two, and the cache is as long as it must be.
"""

import time
from typing import Any

import numpy as np
from harness import serve, warmed
from tunix.generate.sampler import CacheConfig, Sampler
from tunix_model import Identifiers, compare_logits, load, spare_token
from workloads import Workload, sampling_workloads, whole_prompts

# No token has this id: rows run to their limit, as the workload asks.
NEVER = -1


def run(model: Any, workload: Workload, text: np.ndarray, repeats: int) -> dict[str, Any]:
    """One workload of equal limits; a sample more is a row more."""
    rows = np.repeat(whole_prompts(workload, text), workload.samples, axis=0)
    width, length = rows.shape[1], workload.limits[0]
    assert set(workload.limits) == {length}, "the sampler runs a batch as long as its longest row"
    config = model.config
    pad = spare_token(text, config.vocab_size)
    sampler = Sampler(
        model,
        Identifiers(pad, NEVER),
        CacheConfig(width + length, config.num_layers, config.num_kv_heads, config.head_dim),
    )
    texts = [" ".join(map(str, row)) for row in rows.tolist()]
    rules = {"temperature": 0.0} if workload.temperature == 0 else {"temperature": 1.0, "top_p": 1.0, "seed": 0}

    def call() -> list[np.ndarray]:
        found = sampler(texts, length, max_prompt_length=width, eos_tokens=[NEVER], **rules)
        return [np.asarray(tokens) for tokens in found.tokens]

    done, found = warmed(call, repeats)
    assert sum(len(tokens) for tokens in found) == workload.new_tokens
    return {**done, "tokens": [tokens.tolist() for tokens in found]}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, check the logits, run."""
    start = time.perf_counter()
    model = load(spec)
    loading = time.perf_counter() - start
    text = np.load(spec["text"])
    known = sampling_workloads(spec["quick"])
    return {
        "loading_seconds": loading,
        **compare_logits(model, spec["reference"]),
        "workloads": {name: run(model, known[name], text, spec["repeats"]) for name in spec["workloads"]},
    }


if __name__ == "__main__":
    serve(main)
