"""The machine's floor: no program with these weights can sample faster than its rates allow.

Two rates are measured, in a process pinned like the engines': matrix products of the model's shapes (the best
of XLA's and torch's, over prefill-like and decode-like row counts), and reading an array as large as the weights in
float32 (the best of several reductions). Then, with every shared token computed and read once,

    floor = T(prefill) + sum over decode steps of T(step),    T = max(flops / matrix rate, bytes / read rate)

    prefill: every distinct prompt token once through the layers, its causal attention, one row of logits a request;
             the layers' and the head's weights read once.
    step:    one token of every running row through layers and head, its attention over all that came before it;
             the weights read once, the shared prefix's keys and values once, a request's once for all of its samples,
             and those that a row generated itself.

The first new token comes from the prefill, so limit - 1 steps follow. With ends at different lengths as many rows run
in every step as there are slots, until nothing is left (perfect refill). Norms, rotary embeddings, softmax, drawing and
writing are free, which no program achieves.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from harness import serve
from workloads import Workload

FLOAT_BYTES = {"float32": 4, "bfloat16": 2}
SECONDS_PER_RATE = 0.6


def matrix_flops(shape: dict[str, int]) -> tuple[float, float]:
    """Flops of one token through the layers' matrices, and through the head."""
    heads, kv = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]
    d, f = shape["hidden_size"], shape["intermediate_size"]
    layer = 2 * d * heads + 2 * d * kv + 3 * d * f
    return 2.0 * layer * shape["num_layers"], 2.0 * d * shape["vocab_size"]


def attention_flops(shape: dict[str, int]) -> float:
    """Flops of one query over one key, scores and mixing, in all layers."""
    return 4.0 * shape["num_heads"] * shape["head_dim"] * shape["num_layers"]


def kv_bytes(shape: dict[str, int], size: int) -> float:
    """Bytes of one token's keys and values in all layers, of floats of `size` bytes."""
    return 2.0 * size * shape["num_kv_heads"] * shape["head_dim"] * shape["num_layers"]


def weight_bytes(shape: dict[str, int], size: int) -> float:
    """Bytes of the matrices, of floats of `size` bytes; the head is the embedding."""
    return size * sum(matrix_flops(shape)) / 2


def floor_seconds(workload: Workload, shape: dict[str, int], rates: dict[str, float], size: int) -> float:
    """The shortest time in which a workload of floats of `size` bytes can be done; see the module's docstring."""
    layers, head = matrix_flops(shape)
    pair, kv = attention_flops(shape), kv_bytes(shape, size)

    def at_least(flops: float, read: float) -> float:
        return max(flops / (rates["gflops"] * 1e9), read / (rates["gb_per_second"] * 1e9))

    n, shared, own = workload.requests, workload.shared, workload.own
    pairs = shared * (shared + 1) / 2 + n * (own * shared + own * (own + 1) / 2)
    total = at_least((shared + n * own) * layers + n * head + pairs * pair, weight_bytes(shape, size))
    rows = workload.samples * n
    remaining = workload.samples * (sum(workload.limits) - n)
    slots = min(workload.slots, rows)
    steps = max(max(workload.limits) - 1, -(-remaining // slots))
    running = remaining / steps
    # Rows are, on average, as far as the tokens asked for say.
    made = workload.samples * sum(limit * (limit - 1) / 2 for limit in workload.limits) / max(remaining, 1)
    seen = running * (shared + own + made)
    held = shared + running / workload.samples * own + running * made
    return total + steps * at_least(running * (layers + head) + seen * pair, weight_bytes(shape, size) + held * kv)


def best_rate(call: Callable[[], Any], work: float) -> float:
    """The best of repeated calls, in work per second."""
    call()
    best, end = 0.0, time.perf_counter() + SECONDS_PER_RATE
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = max(best, work / (time.perf_counter() - start))
    return best


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Both rates, each with who gave it and what everyone gave."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    torch.set_num_threads(spec["cores"])
    shape = spec["shape"]
    d, f, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    dtype = spec["dtype"]
    matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    products: dict[str, float] = {}
    for rows in (16, 64, 512, 1024):
        for inner, outer in ((d, f), (f, d), (d, v)):
            if rows > 64 and outer == v:
                continue
            work = 2.0 * rows * inner * outer / 1e9
            left = np.random.default_rng(0).standard_normal((rows, inner), np.float32)
            right = np.random.default_rng(1).standard_normal((inner, outer), np.float32)
            name = f"{rows}x{inner}x{outer}"
            a, b = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
            products[f"xla {name}"] = best_rate(lambda a=a, b=b: matmul(a, b).block_until_ready(), work)
            x, y = (torch.from_numpy(part).to(getattr(torch, dtype)) for part in (left, right))
            products[f"torch {name}"] = best_rate(lambda x=x, y=y: torch.mm(x, y), work)
    entries = int(weight_bytes(shape, 4)) // 4
    held = torch.ones(entries)
    table, vector = held[: entries // d * d].view(-1, d), torch.ones(d)
    array = jax.device_put(np.ones(entries, np.float32))
    total = jax.jit(lambda x: x.sum())
    gigabytes = entries * 4 / 1e9
    reads = {
        "torch sum": best_rate(lambda: held.sum(), gigabytes),
        "torch matrix-vector": best_rate(lambda: torch.mv(table, vector), gigabytes),
        "torch max": best_rate(lambda: held.max(), gigabytes),
        "xla sum": best_rate(lambda: total(array).block_until_ready(), gigabytes),
    }
    best_product, best_read = max(products, key=products.__getitem__), max(reads, key=reads.__getitem__)
    return {
        "gflops": products[best_product],
        "gflops_by": best_product,
        "gb_per_second": reads[best_read],
        "gb_per_second_by": best_read,
        "products": products,
        "reads": reads,
    }


if __name__ == "__main__":
    serve(measure)
