"""Prompts that several samples go on from, each read and kept once: which of them have a place, and who sits there."""

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from almost_jax.sampling.padding import bucket_length, bucket_size
from almost_jax.sampling.requests import Request

# What several rows share is kept once where prompts are so long on average: shorter ones are read as fast for each row.
_LONG = 128
# All samples of a prompt wait for slots, of which they may need one in so many.
_WHOLE = 4
# Prompts have programs for so many tokens, and for larger buckets.
_WIDTH = 32


class Table:
    """Q places for prompts, from each of which up to M slots go on.

    members: [Q, M] int32, the slots of each prompt; B where there is none. seats: [B] int32, where a slot sits, counted
    along the rows of `members`; Q M for one that sits nowhere. width: S, the tokens that a prompt may have.
    """

    def __init__(self, prompts: int, samples: int, slots: int, width: int):
        """For B slots, all of which sit nowhere."""
        self.width = width
        self._slots = slots
        self.members = np.full((prompts, samples), slots, np.int32)
        self.seats = np.full(slots, prompts * samples, np.int32)

    @property
    def prompts(self) -> int:
        """Q, how many prompts have a place."""
        return len(self.members)

    def free(self) -> list[int]:
        """The places from which no slot goes on."""
        return np.flatnonzero((self.members == self._slots).all(axis=1)).tolist()

    def next(self, waiting: "collections.deque[Request]", free: int) -> list[Request]:
        """Take from a queue what goes to `free` slots: all samples of a prompt at once, if it has a place.

        Something is taken when no slot is in use.
        """
        chosen: list[Request] = []
        head = list(itertools.islice(waiting, free + 1))
        for run in sample_runs(head)[: len(self.free())]:
            if len(chosen) + len(run) > free or any(one.prompt == run[0].prompt for one in chosen):
                break
            chosen += run
        for _ in chosen:
            waiting.popleft()
        return chosen

    def seat(self, place: int, slots: Sequence[int]) -> None:
        """Let slots, at most M, go on from the prompt at a free place."""
        self.members[place, : len(slots)] = slots
        self.seats[list(slots)] = place * self.members.shape[1] + np.arange(len(slots))

    def leave(self, slot: int) -> None:
        """A slot's request has ended."""
        self.members.reshape(-1)[self.seats[slot]] = self._slots
        self.seats[slot] = self.members.size


def table_for(requests: Sequence[Request], slots: int, batch: int) -> Table | None:
    """A table for requests of which neighbours have the same prompt; None where it would gain nothing.

    It has half as many places again as full slots need, since samples of one prompt end one after the other; fewer, by
    thirds, where there are fewer prompts.

    Args:
        requests: in the order in which they are sampled.
        slots: how many of them run at once.
        batch: B, at least `slots`.
    """
    runs = sample_runs(requests)
    if not runs or any(one.keep or one.parent for one in requests):
        return None
    lengths = [len(run[0].prompt) for run in runs]
    samples, mean = max(map(len, runs)), len(requests) / len(runs)
    if samples > slots or sum(lengths) < _LONG * len(runs):
        return None
    if mean < 2 or samples > 2 * mean:
        # Every place has seats for the most samples of any prompt.
        return None
    if len(requests) > slots and samples > slots // _WHOLE:
        # So many slots at once are rarely free.
        return None
    most = -(-3 * slots // int(2 * mean))
    places = min(bucket_length(len(runs), -(-most // 3)), most)
    return Table(places, samples, batch, bucket_size(max(lengths), _WIDTH))


def sample_runs(requests: Sequence[Request]) -> list[list[Request]]:
    """Neighbours with one prompt together."""
    return [list(run) for _, run in itertools.groupby(requests, key=lambda one: one.prompt)]
