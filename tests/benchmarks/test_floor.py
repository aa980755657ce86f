"""The floor by hand on a shape small enough to count; workloads whose prompts share only what they say they share."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from floor import attention_flops, floor_seconds, kv_bytes, matrix_flops, weight_bytes  # noqa: E402
from workloads import Workload, prompts, sampling_workloads, spread, whole_prompts  # noqa: E402

# D 3, F 5, N 4, K 2, H 6, L 7, V 11. A layer's matrices: query and output 3 x 24 each, key and value 3 x 12 each, three
# of 3 x 5: 261 numbers, 1827 in all layers; the head 33.
SHAPE = {
    "vocab_size": 11,
    "hidden_size": 3,
    "intermediate_size": 5,
    "num_layers": 7,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
}


def test_counts_by_hand() -> None:
    assert matrix_flops(SHAPE) == (2 * 1827, 2 * 33)
    assert weight_bytes(SHAPE, 4) == 4 * (1827 + 33)
    # Scores and mixing: 2 x 2 x 24 flops a layer. Keys and values: 2 x 12 floats a layer.
    assert attention_flops(SHAPE) == 4 * 24 * 7
    assert kv_bytes(SHAPE, 4) == 2 * 12 * 4 * 7


@pytest.mark.parametrize("bound", ["flops", "bytes"])
def test_floor_by_hand(bound: str) -> None:
    # Two requests, one shared token, two of their own, three new ones: two steps after the prefill.
    workload = Workload("tiny", 2, 1, 2, (3, 3), 1, 0.0, 2)
    slow, fast = 1e-9, 1e9
    rates = {"gflops": slow if bound == "flops" else fast, "gb_per_second": fast if bound == "flops" else slow}
    if bound == "flops":
        # 1 + 4 tokens; pairs: 1 in the prefix, and of each request 2 x 1 with it and 1 + 2 of its own.
        prefill = 5 * 3654 + 2 * 66 + (1 + 2 * 5) * 672
        # Each row sees 3 prompt tokens and, on average over its two steps, (1 + 2) / 2 new ones.
        steps = 2 * (2 * (3654 + 66) + 2 * (3 + 1.5) * 672)
        expected = prefill + steps
    else:
        # The weights three times; in each step the shared token once, and of each row two own and 1.5 new ones.
        expected = 3 * 7440 + 2 * (1 + 2 * 2 + 2 * 1.5) * 672
    assert floor_seconds(workload, SHAPE, rates, 4) == pytest.approx(expected)


def test_samples_of_a_request_share_its_prompt() -> None:
    rates = {"gflops": 1e9, "gb_per_second": 1e-9}
    apart = Workload("apart", 8, 0, 50, (4,) * 8, 1, 1.0, 8)
    together = Workload("together", 2, 0, 50, (4,) * 2, 4, 1.0, 8)
    # Three steps in which six prompts of 50 tokens need not be read.
    saved = floor_seconds(apart, SHAPE, rates, 4) - floor_seconds(together, SHAPE, rates, 4)
    assert saved == pytest.approx(3 * 6 * 50 * kv_bytes(SHAPE, 4))


@pytest.mark.parametrize("quick", [False, True])
def test_only_the_prefix_is_shared(quick: bool) -> None:
    text = np.random.default_rng(3).integers(0, 1000, 2400)
    for workload in sampling_workloads(quick).values():
        shared, own = prompts(workload, text)
        assert shared.shape == (workload.shared,) and own.shape == (workload.requests, workload.own)
        assert len({tuple(row[:8]) for row in own.tolist()}) == workload.requests
        whole = whole_prompts(workload, text)
        assert (whole[:, : workload.shared] == shared).all() and (whole[:, workload.shared :] == own).all()
        assert len(workload.limits) == workload.requests


def test_ends_are_spread_over_the_whole_range() -> None:
    lengths = spread(64, 16, 256)
    assert (min(lengths), max(lengths)) == (16, 256)
    # As many below the geometric mean as above it, and not in order.
    assert sum(length < 64 for length in lengths) == 32
    assert list(lengths) != sorted(lengths)
