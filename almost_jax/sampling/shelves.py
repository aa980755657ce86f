"""What ended requests keep of their caches, for the next turn of a dialogue: rows of shelves, which are used again."""

import bisect
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from almost_jax.core.llama import Cache
from almost_jax.sampling.programs import Programs, room


@dataclasses.dataclass
class Shelf:
    """A cache for what ended requests keep, and its rows that are free, in ascending order."""

    cache: Cache
    free: list[int]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """An ended request's tokens, and its row on a shelf."""

    tokens: tuple[int, ...]
    shelf: Shelf
    row: int


class Shelves:
    """The caches that are kept, by the ids of their requests."""

    def __init__(self, programs: Programs, rows: int, bucket: Callable[[int], int]):
        """Empty.

        Args:
            programs: those that copy rows.
            rows: of a new shelf; may be changed at any time.
            bucket: how many rows a program has that copies so many.
        """
        self.rows = rows
        self.shelves: list[Shelf] = []
        self._programs = programs
        self._bucket = bucket
        self._kept: dict[str, _Kept] = {}

    def __contains__(self, name: object) -> bool:
        """Whether something is kept of a request."""
        return name in self._kept

    def tokens(self, name: str) -> tuple[int, ...]:
        """Those that the kept cache of a request holds; none where nothing is kept."""
        return self._kept[name].tokens if name in self._kept else ()

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Free what was kept of some requests, or of all: their rows are used again, empty shelves go."""
        for name in list(self._kept) if names is None else names:
            kept = self._kept.pop(name, None)
            if kept is not None:
                # In an order that doesn't depend on that of the ids, which may differ between hosts.
                bisect.insort(kept.shelf.free, kept.row)
        self.shelves = [shelf for shelf in self.shelves if len(shelf.free) < shelf.cache.lengths.shape[0]]

    def keep(self, cache: Cache, ended: Sequence[tuple[int, str, tuple[int, ...]]]) -> None:
        """Copy rows of the slots' cache, in place of what their requests had kept before.

        Args:
            cache: the slots'.
            ended: of each request its slot, its id and the tokens that the slot's row holds.
        """
        self.forget(name for _, name, _ in ended)
        while ended:
            shelf = self._free_shelf(room(cache))
            part, ended = ended[: len(shelf.free)], ended[len(shelf.free) :]
            rows = shelf.free[: len(part)]
            rest = self._bucket(len(part)) - len(part)
            with self._cleared_on_failure(shelf):
                shelf.cache = self._programs.restore(
                    shelf.cache,
                    cache,
                    np.array([place for place, _, _ in part] + [0] * rest, np.int32),
                    np.array(rows + [shelf.cache.lengths.shape[0]] * rest, np.int32),
                    np.array([len(tokens) for _, _, tokens in part] + [0] * rest, np.int32),
                )
            shelf.free = shelf.free[len(part) :]
            for row, (_, name, tokens) in zip(rows, part, strict=True):
                self._kept[name] = _Kept(tokens, shelf, row)

    def restored(self, cache: Cache, wanted: Mapping[int, tuple[str, int]]) -> Cache:
        """A cache with what is kept copied into its rows; its memory is given up.

        Args:
            cache: that of some prompts, a row each.
            wanted: for rows of it, the id of a request and how many of its first tokens are wanted.
        """
        by_shelf: dict[int, list[int]] = {}
        for row, (name, _) in wanted.items():
            by_shelf.setdefault(id(self._kept[name].shelf), []).append(row)
        rows = cache.lengths.shape[0]
        for members in by_shelf.values():
            kept = [self._kept[wanted[row][0]] for row in members]
            rest = self._bucket(len(members)) - len(members)
            cache = self._programs.restore(
                cache,
                kept[0].shelf.cache,
                np.array([one.row for one in kept] + [0] * rest, np.int32),
                np.array(members + [rows] * rest, np.int32),
                np.array([wanted[row][1] for row in members] + [0] * rest, np.int32),
            )
        return cache

    @contextlib.contextmanager
    def _cleared_on_failure(self, shelf: Shelf) -> Iterator[None]:
        """What is given a shelf's memory and fails leaves nothing of it."""
        try:
            yield
        except BaseException:
            self._kept = {name: kept for name, kept in self._kept.items() if kept.shelf is not shelf}
            self.shelves = [other for other in self.shelves if other is not shelf]
            raise

    def _free_shelf(self, size: int) -> Shelf:
        """A shelf with a free row of so much room."""
        for shelf in self.shelves:
            if shelf.free and room(shelf.cache) == size:
                return shelf
        self.shelves.append(Shelf(self._programs.empty_cache(self.rows, size), list(range(self.rows))))
        return self.shelves[-1]
