"""Ragged rows of tokens as few shapes: bucketed lengths and full batches."""

from collections.abc import Sequence

import numpy as np


def bucket_length(length: int, multiple: int) -> int:
    """The next multiple at or above a length, at least one multiple."""
    return max(-(-length // multiple), 1) * multiple


def pad_batch(rows: Sequence[Sequence[int]], batch_size: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array: zeros on the right, and copies of the first row below until the batch is full.

    Args:
        rows: 1 to `batch_size` rows of tokens.
        batch_size: B.
        multiple: T is the next multiple of it above the longest row.

    Returns:
        Tokens [B, T] int32 and lengths [B] int32.
    """
    full = [*rows, *[rows[0]] * (batch_size - len(rows))]
    lengths = np.array([len(row) for row in full], np.int32)
    tokens = np.zeros((batch_size, bucket_length(int(lengths.max()), multiple)), np.int32)
    for place, row in enumerate(full):
        tokens[place, : len(row)] = row
    return tokens, lengths
