"""Completions as arrays: what belongs to a row, and what of it is text."""

import numpy as np
import pytest

from almost_jax.sampling.requests import Completion, Finish
from almost_jax.sampling.rows import stacked
from almost_jax.sampling.stops import StopStrings

PIECES = [" yes", "\n\n", "<eos>", " no", "\n", "Human: x", " \nHuman:"]


def decode(tokens) -> str:
    return "".join(PIECES[token] for token in tokens if PIECES[token] != "<eos>")


@pytest.mark.parametrize(
    ("tokens", "finish", "content"),
    [
        ((0, 2), "stop_token", 1),
        ((0, 1, 2), "stop_token", 1),
        ((0, 1, 3, 1, 4, 2), "stop_token", 3),
        ((0, 1), "length", 1),
        ((1, 2), "stop_token", 0),
        ((2,), "stop_token", 0),
        ((0, 1, 5), "stop_string", 1),
        ((0, 6), "stop_string", 1),
        ((0, 3), "length", 2),
    ],
)
def test_whitespace_before_an_end_is_no_content(tokens: tuple[int, ...], finish: Finish, content: int):
    """However a row ends: as texts that are scored elsewhere are stripped."""
    one = Completion("one", tokens, tuple(-1.0 - place for place in range(len(tokens))), finish)
    found = stacked([one], 7, StopStrings(("\nHuman:",), decode), decode)
    assert found.content.tolist() == [content] and found.lengths.tolist() == [len(tokens)]
    assert found.stopped.tolist() == [finish != "length"]
    assert found.tokens[0].tolist() == [*tokens, *[0] * (7 - len(tokens))]
    np.testing.assert_array_equal(found.logprobs[0, : len(tokens)], one.logprobs)
    assert not found.logprobs[0, len(tokens) :].any()
