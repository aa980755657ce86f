"""Completions as arrays, for programs that go on with a whole batch of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct

from almost_jax.sampling.engine import Completion


@struct.dataclass
class Samples:
    """What was drawn: G columns, of which each row owns the first `lengths`.

    tokens: [B, G] int32, the stop token included, then zeros. logprobs: [B, G] float32, at the sampling temperature
    (1 when greedy) over the whole vocabulary, then zeros. lengths: [B] int32, with the stop token. stopped: [B] bool,
    False where a limit ended the row.
    """

    tokens: Any
    logprobs: Any
    lengths: Any
    stopped: Any


def stacked(completions: Sequence[Completion], width: int) -> Samples:
    """Completions as rows of one array each.

    Args:
        completions: B of them, in the order of the rows.
        width: G, at least the longest one's tokens.
    """
    tokens = np.zeros((len(completions), width), np.int32)
    logprobs = np.zeros((len(completions), width), np.float32)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion.tokens)] = completion.tokens
        logprobs[row, : len(completion.tokens)] = completion.logprobs
    return Samples(
        tokens,
        logprobs,
        np.array([len(completion.tokens) for completion in completions], np.int32),
        np.array([completion.stopped for completion in completions], bool),
    )
