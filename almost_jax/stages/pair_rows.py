"""Pairs of texts as the rows that are trained on: a row each, or packed, what both begin with read once.

Packed, a step learns from the same pairs by the same loss, so packing changes what it costs and nothing else: each
text sees its own tokens and what both of its pair begin with, at the positions that it has in a row of its own. A pair
stands in one row, so that rows can be split over devices and micro-batches. Source: Krell et al. 2021 for packing, Wang
and Hegde 2024 (arXiv 2410.20305) for the shared beginning.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almost_jax.core.heads import sequence_scores, state_scores
from almost_jax.core.llama import LlamaConfig, Params, hidden_states
from almost_jax.core.losses import LossTerms, pairwise_sums
from almost_jax.core.partitioning import platform
from almost_jax.core.train import Batch
from almost_jax.errors import InputError
from almost_jax.io.batches import enough_rows, first_fit, pad, row_counts
from almost_jax.io.run import Run
from almost_jax.sampling.layout import decode_layout
from almost_jax.stages.training import fixed_length

# Token ids of the chosen and of the rejected text.
TwoTexts: TypeAlias = tuple[Sequence[int], Sequence[int]]


def pair_batch(pairs: Sequence[TwoTexts], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row for each text: tokens [B, 2, T] int32 and lengths [B, 2] int32, chosen before rejected."""
    tokens, lengths = pad([row for pair in pairs for row in pair], length, pad_id)
    return {"tokens": tokens.reshape(len(pairs), 2, length), "lengths": lengths.reshape(len(pairs), 2)}


@dataclasses.dataclass(frozen=True)
class PairTokens:
    """Token ids of two texts, neither empty, of which up to `shared` at the beginning may stand in a row once."""

    chosen: Sequence[int]
    rejected: Sequence[int]
    shared: int

    @classmethod
    def scored(cls, chosen: Sequence[int], rejected: Sequence[int]) -> "PairTokens":
        """Texts whose last tokens are what counts: all that they begin with alike is shared."""
        return cls(chosen, rejected, shared_size(chosen, rejected))


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """The shapes of packed batches, for each of which a program is compiled.

    rows: R of a batch, one number or two, see `io.batches.row_counts`. pairs: P, the most that stand in one row.
    length: T, tokens per row. share: whether what a pair may share stands there once; its attention is then no longer
    one of segments alone.
    """

    rows: tuple[int, ...]
    pairs: int
    length: int
    share: bool

    def places(self, pairs: Sequence[PairTokens]) -> list[list[int]]:
        """The places of the pairs of each row, by `io.batches.first_fit`.

        Raises:
            InputError: a pair is longer than a row, or there are too few rows or places for pairs in one.
        """
        packed = first_fit([packed_size(pair, self.share) for pair in pairs], self.length)
        most = max(map(len, packed), default=0)
        if len(packed) > self.rows[-1] or most > self.pairs:
            raise InputError(
                f"{len(pairs)} pairs need {len(packed)} rows of {self.length} tokens and up to {most} pairs, "
                f"not {self.rows[-1]} of up to {self.pairs}"
            )
        return packed

    def batch(self, pairs: Sequence[PairTokens], pad_id: int) -> dict[str, np.ndarray]:
        """Pairs packed into rows as `places` says.

        Args:
            pairs: as many as fit.
            pad_id: what fills the rest.

        Returns:
            tokens, positions, segment_ids and, where pairs share, seen_ids [R, T] int32: a token sees what stands
            before it in the segment `segment_ids` and in the one that `seen_ids` names. ends [R, P, 2] int32 are the
            places of the last tokens of chosen and rejected, present [R, P] bool says where a pair is. Segments count
            from 1 in each row; padding is segment 0, so that it sees no pair and none sees it.

        Raises:
            InputError: see `places`.
        """
        packed = self.places(pairs)
        rows = enough_rows(self.rows, len(packed))
        tokens = np.full((rows, self.length), pad_id, np.int32)
        positions, segments, seen = (np.zeros((rows, self.length), np.int32) for _ in range(3))
        ends = np.zeros((rows, self.pairs, 2), np.int32)
        present = np.zeros((rows, self.pairs), bool)
        for row, places in enumerate(packed):
            start, segment = 0, 1
            for slot, pair in enumerate(pairs[place] for place in places):
                shared, beginning = pair.shared if self.share else 0, segment
                present[row, slot] = True
                parts = ((pair.chosen[:shared], 0), (pair.chosen[shared:], shared), (pair.rejected[shared:], shared))
                for side, (part, first) in enumerate(parts):
                    here = slice(start, start + len(part))
                    tokens[row, here], positions[row, here] = part, first + np.arange(len(part))
                    segments[row, here], seen[row, here] = segment, beginning if shared else segment
                    start, segment = start + len(part), segment + 1
                    if side:
                        ends[row, slot, side - 1] = start - 1
        batch = {"tokens": tokens, "positions": positions, "segment_ids": segments, "ends": ends, "present": present}
        return batch | ({"seen_ids": seen} if self.share else {})


class Spent(NamedTuple):
    """What a packed step takes on average: tokens, and places for them in rows."""

    tokens: float
    places: float


def packed_rows(
    pairs_at: Callable[[int], Sequence[PairTokens]], steps: int, length: int, split: int, share: bool
) -> tuple[PackedRows, Spent]:
    """Shapes that hold the batch of every step, and what steps take of them.

    Args:
        pairs_at: the pairs of a step, counted from 0.
        steps: how many there are.
        length: tokens per row; as many as the longest pair takes, rounded up, if that is more.
        split: what the number of rows must be a multiple of.
        share: see `PackedRows`.
    """
    sizes = [[packed_size(pair, share) for pair in pairs_at(step)] for step in range(steps)]
    longest = max(map(max, sizes))
    length = length if longest <= length else fixed_length(longest)
    packed = [first_fit(batch, length) for batch in sizes]
    counts = row_counts([len(batch) for batch in packed], split)
    rows = PackedRows(counts, max(len(row) for batch in packed for row in batch), length, share)
    places = length * statistics.fmean(enough_rows(counts, len(batch)) for batch in packed)
    return rows, Spent(statistics.fmean(map(sum, sizes)), places)


def say_of_packing(run: Run, name: str, packed: PackedRows, spent: Spent, pairs: int, length: int) -> None:
    """Say what rows a stage's batches of `pairs` take, and if rows of `length` for each text would take less."""
    unpacked, counts = 2 * pairs * length, " or ".join(map(str, packed.rows))
    run.say(f"{name}: {pairs} pairs in {counts} rows of {packed.length} tokens a step")
    if spent.places > unpacked:
        run.say(
            f"{name}: warning: that is {spent.places:.0f} places, more than the {unpacked} of a row for each text; "
            "give shorter rows, fewer micro-batches or packed_length 0"
        )


def shared_size(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many tokens both texts begin with, but for the last of either: each keeps an end of its own."""
    most = min(len(chosen), len(rejected)) - 1
    differing = (place for place in range(most) if chosen[place] != rejected[place])
    return next(differing, most)


def packed_size(pair: PairTokens, share: bool) -> int:
    """How many tokens a pair takes in a packed row."""
    return len(pair.chosen) + len(pair.rejected) - (pair.shared if share else 0)


def packed_states(flat: Params, config: LlamaConfig, batch: Batch) -> jax.Array:
    """Hidden states [R, T, D] of a batch from `PackedRows.batch`."""
    return hidden_states(
        flat,
        config,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        seen_ids=batch.get("seen_ids"),
    )


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
        every, ends = state_scores(flat, packed_states(flat, config, batch)), batch["ends"]
        scores: jax.Array = jnp.take_along_axis(every, ends.reshape(ends.shape[0], -1), axis=1).reshape(ends.shape)
        return pairwise_sums(scores[..., 0], scores[..., 1], margin, centering, batch["present"])
    batch_size, _, length = batch["tokens"].shape
    scores = sequence_scores(
        flat, config, batch["tokens"].reshape(2 * batch_size, length), batch["lengths"].reshape(2 * batch_size)
    ).reshape(batch_size, 2)
    return pairwise_sums(scores[:, 0], scores[:, 1], margin, centering)
