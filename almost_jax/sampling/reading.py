"""Which prompts a prefill reads together, so that few shapes are compiled and little padding is read."""

import dataclasses
from collections.abc import Sequence

from almost_jax.sampling.padding import bucket_size

# Prompts have programs for so many tokens, and for larger buckets; short ones, as queries behind a few-shot prefix are,
# have one of their own.
_PROMPT, _SHORT = 32, 16
# To call a program once more costs about as much as so many more tokens in it: the weights are read again.
_CALL = 128


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that one program reads.

    width: the tokens that each is padded to. rows: the prompts that the program reads, padding included. members: which
    they are, at most `rows`.
    """

    width: int
    rows: int
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The rows that prefills have programs for.

    few: of a refill whose prompts have several samples each. usual: of any refill. all: of every slot. parts: each is a
    multiple of it. most_tokens: what a program may read, padding included; `parts` prompts it may read anyway.
    """

    few: int
    usual: int
    all: int
    parts: int
    most_tokens: int

    def of(self, width: int) -> list[int]:
        """Those that read prompts of a width, ascending."""
        full = self.most_tokens // width // self.parts * self.parts
        fitting = {size for size in (self.few, self.usual, self.all) if size <= full}
        return sorted(fitting | {max(min(full, self.usual), self.parts)})


def batches(lengths: Sequence[int], sizes: Sizes) -> list[Batch]:
    """Divide prompts among programs.

    Prompts of different widths are read together where that costs less than another program does: at a refill there
    are few of each.

    Args:
        lengths: tokens to read of each prompt.
        sizes: of the programs.

    Returns:
        Each prompt once, those of one batch in their order.
    """
    by_width: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        by_width.setdefault(_SHORT if length <= _SHORT else bucket_size(length, _PROMPT), []).append(place)
    piles: list[tuple[int, list[int]]] = []
    for width, members in sorted(by_width.items()):
        if piles:
            joined = sorted([*piles[-1][1], *members])
            apart = sum(_cost(one, len(own), sizes) for one, own in (piles[-1], (width, members)))
            if _cost(width, len(joined), sizes) <= apart:
                piles[-1] = width, joined
                continue
        piles.append((width, members))
    found = []
    for width, members in piles:
        rows = _rows(width, len(members), sizes)
        found += [Batch(width, rows, tuple(members[at : at + rows])) for at in range(0, len(members), rows)]
    return found


def _rows(width: int, count: int, sizes: Sizes) -> int:
    """The size of the program that reads so many prompts at the least cost."""
    return min(reversed(sizes.of(width)), key=lambda rows: _calls(count, rows) * (rows * width + _CALL))


def _cost(width: int, count: int, sizes: Sizes) -> int:
    """Tokens, and calls as tokens."""
    rows = _rows(width, count, sizes)
    return _calls(count, rows) * (rows * width + _CALL)


def _calls(count: int, rows: int) -> int:
    return -(-count // rows)
