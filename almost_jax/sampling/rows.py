"""Completions as arrays, for programs that go on with a whole batch of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import struct

from almost_jax.sampling.requests import Completion
from almost_jax.sampling.stops import StopStrings, without_space


@struct.dataclass
class Samples:
    """What was drawn: G columns, of which each row owns the first `lengths`.

    tokens: [B, G] int32, those of a stop included, then zeros. logprobs: [B, G] float32, at the sampling temperature
    (1 when greedy) over the whole vocabulary, then zeros. lengths: [B] int32, with what stopped the row; content: [B]
    int32, without it and without whitespace before it. stopped: [B] bool, False where a limit ended the row.
    """

    tokens: Any
    logprobs: Any
    lengths: Any
    content: Any
    stopped: Any


def stacked(
    completions: Sequence[Completion], width: int, stops: StopStrings | None, decode: Callable[[Sequence[int]], str]
) -> Samples:
    """Completions as rows of one array each.

    Args:
        completions: B of them, in the order of the rows.
        width: G, at least the longest one's tokens.
        stops: the stop strings that they were drawn with.
        decode: the text of tokens, with the whitespace at its end.
    """

    def content(completion: Completion) -> int:
        if stops is not None and completion.finish == "stop_string":
            return stops.before(completion.tokens)
        return without_space(completion.content, decode)

    tokens = np.zeros((len(completions), width), np.int32)
    logprobs = np.zeros((len(completions), width), np.float32)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion.tokens)] = completion.tokens
        logprobs[row, : len(completion.tokens)] = completion.logprobs
    return Samples(
        tokens,
        logprobs,
        np.array([len(completion.tokens) for completion in completions], np.int32),
        np.array([content(completion) for completion in completions], np.int32),
        np.array([completion.finish != "length" for completion in completions], bool),
    )
