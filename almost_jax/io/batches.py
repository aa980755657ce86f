"""Token lists to padded arrays, and which examples make up the batch of a step."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from almost_jax.errors import InputError


def pad(sequences: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pad sequences on the right to one length.

    Args:
        sequences: B lists of token ids, of any length up to `length`, 0 included.
        length: T, tokens per row.
        pad_id: what fills the rest; masks come from the lengths, so it may be a real token too.

    Returns:
        tokens [B, T] int32 and lengths [B] int32.

    Raises:
        InputError: a sequence is longer than `length`.
    """
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    lengths = np.zeros((len(sequences),), np.int32)
    for row, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise InputError(f"sequence {row} has {len(sequence)} tokens, but rows have room for {length}")
        tokens[row, : len(sequence)] = sequence
        lengths[row] = len(sequence)
    return tokens, lengths


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack sequences into rows: the longest first, each into the first row that has room left for it.

    First fit by decreasing length needs at most 11/9 of the rows of the best packing, and one more (Johnson 1973). The
    result is a function of the arguments: equal lengths keep their order.

    Args:
        lengths: of n sequences, in tokens.
        room: tokens per row.

    Returns:
        For each row the places of its sequences, in the order in which they were put there.

    Raises:
        InputError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if lengths[place] > room:
            raise InputError(f"sequence {place} has {lengths[place]} tokens, but rows have room for {room}")
        row = next((row for row, space in enumerate(left) if space >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(place)
        left[row] -= lengths[place]
    return rows


def row_counts(needed: Sequence[int], split: int) -> tuple[int, ...]:
    """Of how many rows packed batches are: of one number or of two, for each of which a program is compiled.

    Two where that saves a tenth of all rows at least: a rare batch that packs badly makes no other one longer.

    Args:
        needed: rows that each batch needs, of at least one batch.
        split: what the numbers must be a multiple of.

    Returns:
        Ascending numbers; the last is enough for all.
    """
    rounded = [-(-rows // split) * split for rows in needed]
    most = max(rounded)

    def total(count: int) -> int:
        return sum(count if rows <= count else most for rows in rounded)

    best = min(sorted(set(rounded)), key=total)
    return (best, most) if total(best) <= 0.9 * total(most) else (most,)


def enough_rows(counts: Sequence[int], needed: int) -> int:
    """The smallest of the numbers that `row_counts` gave that is enough, or the last."""
    return next((rows for rows in counts if rows >= needed), counts[-1])


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on (seed, epoch) alone.

    Sorts raw Philox words, a stream that NumPy promises never to change (its shuffles carry no such promise).
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def batch_indices(step: int, batch_size: int, n: int, seed: int) -> NDArray[np.int64]:
    """Which of n examples make up the batch of a step.

    The epochs' permutations are laid end to end and cut into batches, so every batch is full, an epoch sees every
    example once, and a batch may straddle two epochs. A function of its arguments alone: resuming needs no saved state.

    Args:
        step: counted from 0.
        batch_size: B; may exceed n.
        n: number of examples, at least 1.
        seed: of the order.

    Returns:
        [B] int64 indices in 0..n-1.

    Raises:
        InputError: there are no examples.
    """
    if n < 1:
        raise InputError("there are 0 examples to make batches of; at least 1 is needed")
    places = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    orders = {int(epoch): epoch_order(seed, int(epoch), n) for epoch in np.unique(places // n)}
    return np.array([orders[int(place // n)][place % n] for place in places], np.int64)
