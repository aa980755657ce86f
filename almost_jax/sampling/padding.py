"""Ragged rows of tokens as few shapes: bucketed lengths and full batches."""

from collections.abc import Sequence

import numpy as np


def bucket_length(length: int, multiple: int) -> int:
    """The next multiple at or above a length, at least one multiple."""
    return max(-(-length // multiple), 1) * multiple


def bucket_size(length: int, smallest: int) -> int:
    """A length for which programs are compiled, at or above `length`: few.

    Doubling from `smallest` to four times as much, then multiples of a quarter of the power of two below, which are at
    most a quarter too long: from 16 on 16, 32, 64, 80, 96, 112, 128, 160, ..., from 64 on 64, 128, 256, 320, ...
    """
    size = smallest
    while size < length and size < 4 * smallest:
        size *= 2
    if length <= size:
        return size
    power = 1 << ((length - 1).bit_length() - 1)
    return bucket_length(length, max(power // 4, 1))


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
    return pad_rows(full, bucket_length(int(lengths.max()), multiple)), lengths


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Rows of tokens as one array [n, width] int32, zeros on the right."""
    tokens = np.zeros((len(rows), width), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens
