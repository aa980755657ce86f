"""Worker: the sampling workloads by transformers on torch: `generate` with its key-value cache, greedy or at
temperature 1, as a user who knows it calls it.

Whichever of its attention implementations is faster on a short run of the workload is used. torch.compile, which needs
a C++ compiler on the machine, is left out.
"""

import time
from typing import Any

import numpy as np
import torch
from harness import logits_differences, serve, timed
from transformers import AutoModelForCausalLM
from workloads import Workload, sampling_workloads, whole_prompts

IMPLEMENTATIONS = ("sdpa", "eager")
PROBE_TOKENS = 8


def generate(model: Any, rows: np.ndarray, new_tokens: int, temperature: float, samples: int) -> np.ndarray:
    """New tokens [rows x samples, new_tokens]."""
    tokens = torch.from_numpy(rows).long()
    # No padding id is in the way: prompts are equally long, and the mask says so.
    drawing = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            num_return_sequences=samples,
            use_cache=True,
            **drawing,
        )
    return out[:, rows.shape[1] :].numpy()


def faster(model: Any, rows: np.ndarray) -> tuple[str, dict[str, float]]:
    """The attention implementation that is faster on a few tokens, and what each took."""
    seconds = {}
    for name in IMPLEMENTATIONS:
        model.set_attn_implementation(name)
        generate(model, rows[:, :64], 2, 0.0, 1)
        seconds[name] = timed(lambda: generate(model, rows, PROBE_TOKENS, 0.0, 1), 1)[0][0]
    best = min(seconds, key=seconds.__getitem__)
    model.set_attn_implementation(best)
    return best, seconds


def run(model: Any, workload: Workload, text: np.ndarray, repeats: int) -> dict[str, Any]:
    """One workload; best-of-N as N separate passes, and once more as one call for N sequences."""
    rows = whole_prompts(workload, text)
    length = workload.limits[0]
    assert set(workload.limits) == {length}, "transformers runs a batch as long as its longest row"
    implementation, probes = faster(model, rows)

    def passes() -> list[np.ndarray]:
        return [generate(model, rows, length, workload.temperature, 1) for _ in range(workload.samples)]

    seconds, found = timed(passes, repeats)
    done = {"seconds": seconds, "attention": implementation, "probe_seconds": probes, "tokens": found[0].tolist()}
    assert sum(part.size for part in found) == workload.new_tokens
    if workload.samples > 1:
        once = timed(lambda: generate(model, rows, length, workload.temperature, workload.samples), repeats)[0]
        done["one_call_seconds"] = once
    return done


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, check the logits, run."""
    torch.manual_seed(0)
    torch.set_num_threads(spec["cores"])
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=getattr(torch, spec["dtype"])).eval()
    loading = time.perf_counter() - start
    reference = np.load(spec["reference"])
    with torch.inference_mode():
        found = model(torch.from_numpy(reference["tokens"]).long()).logits.float().numpy()
    differences = logits_differences(found, reference["logits"])
    text = np.load(spec["text"])
    known = sampling_workloads(spec["quick"])
    return {
        "loading_seconds": loading,
        **differences,
        "workloads": {name: run(model, known[name], text, spec["repeats"]) for name in spec["workloads"]},
    }


if __name__ == "__main__":
    serve(main)
