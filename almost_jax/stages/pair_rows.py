"""Pairs of texts as the rows that a reward model is trained on: a row each, or packed, a shared beginning read once.

Packed, a step learns from the same pairs by the same loss, so packing changes what it costs and nothing else: each
text sees its own tokens and what both of its pair begin with, at the positions that it has in a row of its own. A pair
stands in one row, so that rows can be split over devices and micro-batches.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almost_jax.core.heads import sequence_scores, token_scores
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.losses import LossTerms, pairwise_sums
from almost_jax.core.partitioning import platform
from almost_jax.core.train import Batch
from almost_jax.errors import InputError
from almost_jax.io.batches import first_fit, pad
from almost_jax.sampling.layout import decode_layout

# Token ids of the chosen and of the rejected text.
PairTokens: TypeAlias = tuple[Sequence[int], Sequence[int]]


def pair_batch(pairs: Sequence[PairTokens], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row for each text: tokens [B, 2, T] int32 and lengths [B, 2] int32, chosen before rejected."""
    tokens, lengths = pad([row for pair in pairs for row in pair], length, pad_id)
    return {"tokens": tokens.reshape(len(pairs), 2, length), "lengths": lengths.reshape(len(pairs), 2)}


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """The shape of all packed batches, of which one program is compiled.

    rows: R of a batch. pairs: P, the most that stand in one row. length: T, tokens per row. share: whether what both
    texts of a pair begin with stands there once; their attention is then no longer one of segments alone.
    """

    rows: int
    pairs: int
    length: int
    share: bool

    def batch(self, pairs: Sequence[PairTokens], pad_id: int) -> dict[str, np.ndarray]:
        """Pairs packed into rows by `io.batches.first_fit`.

        Args:
            pairs: none of whose texts is empty.
            pad_id: what fills the rest.

        Returns:
            tokens, positions, segment_ids and, where pairs share, seen_ids [R, T] int32: a token sees what stands
            before it in the segment `segment_ids` and in the one that `seen_ids` names. ends [R, P, 2] int32 are the
            places of the last tokens of chosen and rejected, present [R, P] bool says where a pair is. Segments count
            from 1 in each row; padding is segment 0, so that it sees no pair and none sees it.

        Raises:
            InputError: a pair is longer than a row, or there are too few rows or places for pairs in one.
        """
        packed = first_fit([packed_size(*pair, self.share) for pair in pairs], self.length)
        most = max(map(len, packed), default=0)
        if len(packed) > self.rows or most > self.pairs:
            raise InputError(
                f"{len(pairs)} pairs need {len(packed)} rows of {self.length} tokens and up to {most} pairs, "
                f"not {self.rows} of up to {self.pairs}"
            )
        tokens = np.full((self.rows, self.length), pad_id, np.int32)
        positions, segments, seen = (np.zeros((self.rows, self.length), np.int32) for _ in range(3))
        ends = np.zeros((self.rows, self.pairs, 2), np.int32)
        present = np.zeros((self.rows, self.pairs), bool)
        for row, places in enumerate(packed):
            start, segment = 0, 1
            for slot, place in enumerate(places):
                chosen, rejected = pairs[place]
                shared = shared_size(chosen, rejected) if self.share else 0
                beginning = segment
                present[row, slot] = True
                parts = ((chosen[:shared], 0), (chosen[shared:], shared), (rejected[shared:], shared))
                for side, (part, first) in enumerate(parts):
                    here = slice(start, start + len(part))
                    tokens[row, here], positions[row, here] = part, first + np.arange(len(part))
                    segments[row, here], seen[row, here] = segment, beginning if shared else segment
                    start, segment = start + len(part), segment + 1
                    if side:
                        ends[row, slot, side - 1] = start - 1
        batch = {"tokens": tokens, "positions": positions, "segment_ids": segments, "ends": ends, "present": present}
        return batch | ({"seen_ids": seen} if self.share else {})


    def tokens(self, pairs: Sequence[PairTokens]) -> int:
        """How many of a batch's places are no padding."""
        return sum(packed_size(*pair, self.share) for pair in pairs)


def packed_rows(
    pairs_at: Callable[[int], Sequence[PairTokens]], steps: int, length: int, split: int, share: bool
) -> PackedRows:
    """The smallest shape that holds the batch of every step.

    Args:
        pairs_at: the pairs of a step, counted from 0.
        steps: how many there are.
        length: tokens per row.
        split: what the number of rows must be a multiple of.
        share: see `PackedRows`.

    Raises:
        InputError: a pair is longer than a row.
    """
    packed = [first_fit([packed_size(*pair, share) for pair in pairs_at(step)], length) for step in range(steps)]
    rows = max(len(batch) for batch in packed)
    return PackedRows(-(-rows // split) * split, max(len(row) for batch in packed for row in batch), length, share)


def shared_size(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many tokens both texts begin with, but for the last of either: each keeps an end of its own."""
    most = min(len(chosen), len(rejected)) - 1
    differing = (place for place in range(most) if chosen[place] != rejected[place])
    return next(differing, most)


def packed_size(chosen: Sequence[int], rejected: Sequence[int], share: bool) -> int:
    """How many tokens a pair takes in a packed row."""
    return len(chosen) + len(rejected) - (shared_size(chosen, rejected) if share else 0)


def pair_loss_sums(
    params: Params, batch: Batch, *, config: LlamaConfig, margin: float, centering: float
) -> LossTerms:
    """The ranking loss of a batch of pairs, both texts of a pair in one forward pass.

    Args:
        params: a tree with a head.
        batch: from `pair_batch` or `PackedRows.batch`.
        config: the model's shape.
        margin, centering: see `core.losses.pairwise_sums`.

    Returns:
        Sum of losses, number of pairs, metrics.
    """
    flat, config = decode_layout(params, config, platform())
    if "ends" in batch:
        segments = batch["positions"], batch["segment_ids"], batch.get("seen_ids")
        every, ends = token_scores(flat, config, batch["tokens"], *segments), batch["ends"]
        scores: jax.Array = jnp.take_along_axis(every, ends.reshape(ends.shape[0], -1), axis=1).reshape(ends.shape)
        return pairwise_sums(scores[..., 0], scores[..., 1], margin, centering, batch["present"])
    batch_size, _, length = batch["tokens"].shape
    scores = sequence_scores(
        flat, config, batch["tokens"].reshape(2 * batch_size, length), batch["lengths"].reshape(2 * batch_size)
    ).reshape(batch_size, 2)
    return pairwise_sums(scores[:, 0], scores[:, 1], margin, centering)
