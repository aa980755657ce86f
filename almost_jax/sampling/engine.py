"""Many requests over one model: a shared prefix, fixed slots that are refilled, a key of its own for every request.

The host wakes every few steps: it collects what has ended, looks for stop strings, and gives free slots to the requests
that wait. What the device has to do next is handed to it before what has ended goes to the caller, so that both work
side by side. Requests with the same prompt share one prefill of it (the N samples of a query), all of them share the
prefix (a few-shot prompt), and a request whose prompt goes on from an earlier one's text (the next turn of a dialogue)
reads only what is new. A long prompt with several samples stays one copy, which every step reads once for all of them.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import struct
from jax import Array

from almost_jax.core.llama import Cache, LlamaConfig, Params, Prefix, Prompts
from almost_jax.sampling.keys import id_words, root_data
from almost_jax.sampling.layout import sampling_layout
from almost_jax.sampling.padding import bucket_size, pad_rows
from almost_jax.sampling.programs import Programs, place_of, room
from almost_jax.sampling.reading import Sizes, batches
from almost_jax.sampling.requests import Completion, Finish, Request, Settings, check_requests, check_tokens
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.sampler import Drawn, Slots
from almost_jax.sampling.shelves import Shelves
from almost_jax.sampling.stats import Stats
from almost_jax.sampling.stops import StopStrings
from almost_jax.sampling.table import Table, table_for

# Slots have programs with room for so many tokens, and for larger buckets.
_ROOM = 64
# Free slots are given away when one in so many is free: to read one prompt costs nearly as much as to read a few.
_REFILLED = 8
# Of what is given away at a refill, one in so many has a prompt of its own where queries have several samples.
_FORKED = 4


@dataclasses.dataclass
class _Running:
    """A request in a slot: what it is known to have drawn, and how many of its tokens hold no stop string."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    checked: int = 0


@struct.dataclass
class _Admitted:
    """The first tokens [A] int32 and their log-probs [A] float32 of requests that were put into slots at `places`."""

    places: tuple[int, ...] = struct.field(pytree_node=False)
    tokens: Array
    logprobs: Array


class Engine:
    """Samples from one model by one set of rules behind one prefix; `stats` counts what it does.

    A request's tokens depend on the model, its prompt, the rules, the seed and its id alone. On several hosts all of
    them must be given the same requests; what they decide depends on arrays that all of them hold.
    """

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        rules: SamplingRules,
        settings: Settings,
        *,
        seed: int,
        prefix_tokens: Sequence[int],
        stops: StopStrings | None = None,
    ):
        """For a model's tree as it was loaded, or in the layout of `sampling_layout`.

        Raises:
            InputError: a token of the prefix is outside the vocabulary.
        """
        check_tokens("prefix", prefix_tokens, config.vocab_size)
        place = place_of(params)
        self._programs = Programs(*sampling_layout(params, config, place.platform), rules)
        self._config, self._rules, self._settings, self._stops = config, rules, settings, stops
        self._root = root_data(seed)
        self._prefix_tokens = tuple(prefix_tokens)
        self._prefix: Prefix | None = None
        # As many more slots as it takes to split them evenly over the devices.
        self._batch = -(-settings.slots // place.rows) * place.rows
        self._rows = place.rows
        # More steps than the longest completion has would be for nothing.
        self._steps = min(settings.steps_per_wake, rules.max_new_tokens)
        usual = self._bucket(1)
        few = self._even(-(-usual // _FORKED))
        self._sizes = Sizes(few, usual, self._batch, place.rows, settings.prefill_tokens)
        self._shelves = Shelves(self._programs, self._batch, self._bucket)
        self._busy = False
        self._slots: Slots | None = None
        # The prompts that samples share in the run that is going on, and what was read of them.
        self._table: Table | None = None
        self._shared: Cache | None = None
        self.stats = Stats()

    def run(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Continue every request; completions come as they finish.

        One run at a time: exhaust or close what is returned before the next run begins.

        Raises:
            RuntimeError: the run before still goes on.
            InputError: an empty prompt, a token outside the vocabulary, an id given twice, a limit above the rules', an
                unknown parent, or a prompt that leaves no room for its new tokens within the model's positions.
        """
        check_requests(requests, self._config, self._rules.max_new_tokens, len(self._prefix_tokens), self._shelves)
        return self._run(requests)

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Free what was kept of some requests, or of all: their rows are used again, empty shelves go."""
        self._shelves.forget(ids)

    def _run(self, requests: Sequence[Request]) -> Iterator[Completion]:
        waiting = collections.deque(requests)
        running: dict[int, _Running] = {}
        completions: list[Completion] = []
        with self._alone(), self.stats.measured(self._programs), self._emptied_on_failure():
            self._shelves.rows = self._bucket(min(sum(one.keep for one in requests), self._batch))
            with self._sharing(requests):
                while waiting or running:
                    admitted: list[_Admitted] = []
                    if waiting and (not running or self._refills(len(running))):
                        admitted = self._admit(waiting, running)
                    self._slots, drawn = self._programs.decode(self._taken(), *self._before(), self._steps)
                    yield from completions
                    ended = self._collect(running, *jax.device_get((drawn, admitted)))
                    self._set_aside([(place, running[place]) for place, _ in ended])
                    for place, _ in ended:
                        del running[place]
                        if self._table is not None:
                            self._table.leave(place)
                    completions = [completion for _, completion in ended]
            with self.stats.paused():
                yield from completions

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Slots and table are of one run."""
        if self._busy:
            raise RuntimeError("this engine's last run still goes on; exhaust or close its completions first")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @contextlib.contextmanager
    def _emptied_on_failure(self) -> Iterator[None]:
        """Where the caller leaves off, or something fails, what the slots held is nobody's."""
        try:
            yield
        except BaseException:
            self._slots = None
            raise

    @contextlib.contextmanager
    def _sharing(self, requests: Sequence[Request]) -> Iterator[None]:
        """Keep prompts that several of the requests have once, where that gains something."""
        # On several devices the rows of a prompt may lie on several of them.
        if self._programs.place.mesh is None:
            self._table = table_for(requests, self._settings.slots, self._batch)
        if self._table is not None:
            self._shared = self._programs.empty_cache(self._table.prompts, self._table.width)
        try:
            yield
        finally:
            self._table = self._shared = None

    def _before(self) -> tuple[Prefix | None, Prompts | None]:
        """What stands before the slots' own caches: the prefix of all, and prompts that several of them share."""
        if self._table is None or self._shared is None:
            return self._prefix, None
        put = self._programs.place.put
        return self._prefix, Prompts(self._shared, put(self._table.members), put(self._table.seats))

    def _refills(self, running: int) -> bool:
        """Whether enough slots are free, beside so many that run, to be worth a prefill."""
        slots = self._settings.slots
        return self._settings.refill and slots - running >= -(-slots // _REFILLED)

    def _admit(self, waiting: "collections.deque[Request]", running: dict[int, _Running]) -> list[_Admitted]:
        """Give free slots to waiting requests."""
        free = [place for place in range(self._settings.slots) if place not in running]
        if self._table is None:
            chosen = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        else:
            chosen = self._table.next(waiting, len(free))
        if not chosen:
            return []
        if self._prefix_tokens and self._prefix is None:
            self._prefix = self._programs.prefix(np.array(self._prefix_tokens, np.int32))
            self.stats.prefill_tokens += len(self._prefix_tokens)
        self._make_room(chosen, [one.request for one in running.values()])
        admitted: list[_Admitted] = []
        for group in self._groups(chosen):
            places = [free.pop(0) for _ in group.requests]
            if len(admitted) > 1:
                # The caches that were read for no more than two groups are in memory.
                jax.block_until_ready(admitted[-2])
            admitted.append(self._fill(group, places))
            running.update({place: _Running(one) for place, one in zip(places, group.requests, strict=True)})
        return admitted

    def _make_room(self, chosen: Sequence[Request], running: Sequence[Request]) -> None:
        """Slots with room for every request that will be in them."""
        every = [*chosen, *running]
        own = [self._limit(one) + (0 if self._table is not None else len(one.prompt)) for one in every]
        size = bucket_size(max(own), _ROOM)
        if self._slots is None or (not running and room(self._slots.cache) > size):
            self._slots = None
            self._slots = self._programs.empty_slots(self._batch, size, *self._before(), self._steps)
        elif room(self._slots.cache) < size:
            self._slots = self._programs.grow(self._taken(), size, *self._before(), self._steps)

    def _groups(self, chosen: Sequence[Request]) -> "list[_Group]":
        """Requests whose prompts are read together: of one shape, no more than a program should read."""
        forks: dict[tuple[tuple[int, ...], str | None], list[Request]] = {}
        for request in chosen:
            forks.setdefault((request.prompt, request.parent), []).append(request)
        starts = [self._known(*fork) for fork in forks]
        new = [len(prompt) - start for (prompt, _), start in zip(forks, starts, strict=True)]
        owners = list(forks.values())
        groups = []
        # What goes on from an earlier text needs a cache that holds it, and a program of its own.
        for goes_on in (False, True):
            places = [place for place, start in enumerate(starts) if (start > 0) == goes_on]
            for batch in batches([new[place] for place in places], self._sizes):
                members = [places[one] for one in batch.members]
                groups.append(
                    _Group(batch.width, batch.rows, [starts[one] for one in members], [owners[one] for one in members])
                )
        return groups

    def _known(self, prompt: tuple[int, ...], parent: str | None) -> int:
        """How many of a prompt's first tokens its parent's cache holds; never all, since the last one predicts."""
        # A parent may have been forgotten since the run began: then all is read.
        found = () if parent is None else self._shelves.tokens(parent)
        same = next((i for i, (one, other) in enumerate(zip(prompt, found, strict=False)) if one != other), len(found))
        return min(same, len(prompt) - 1, len(found))

    def _fill(self, group: "_Group", places: list[int]) -> _Admitted:
        """Read a group's prompts and admit its requests to slots."""
        prompts = [own[0].prompt for own in group.forks]
        rows = group.rows
        new = [prompt[start:] for prompt, start in zip(prompts, group.starts, strict=True)]
        padded = pad_rows([*new, *[(0,)] * (rows - len(new))], group.width)
        lengths = np.array([len(one) for one in new] + [1] * (rows - len(new)), np.int32)
        requests = group.requests
        count = self._bucket(len(requests))
        rest = count - len(requests)
        keys = self._programs.keys(self._root, id_words([one.id for one in requests], count))
        kept = self._restored(group, rows) if any(group.starts) else None
        read = self._programs.prefill(padded, lengths, kept, self._prefix)
        self.stats.prefill_tokens += sum(map(len, new))
        self.stats.prefill_tokens_asked += sum(len(self._prefix_tokens) + len(one.prompt) for one in requests)
        self._seat(group, places, read[1], lengths)
        sources = [row for row, own in enumerate(group.forks) for _ in own]
        self._slots, tokens, logprobs = self._programs.admit(
            self._taken(),
            read,
            np.array(sources + [0] * rest, np.int32),
            np.array(places + [self._batch] * rest, np.int32),
            keys,
            np.array([self._limit(one) for one in requests] + [1] * rest, np.int32),
            self._table is None,
        )
        return _Admitted(tuple(places), tokens, logprobs)

    def _seat(self, group: "_Group", places: Sequence[int], read: Cache, lengths: np.ndarray) -> None:
        """Where prompts are shared, give each of a group a place in the table, and its requests' slots seats at it."""
        if self._table is None or self._shared is None:
            return
        free, slots = self._table.free()[: len(group.forks)], iter(places)
        for place, own in zip(free, group.forks, strict=True):
            self._table.seat(place, list(itertools.islice(slots, len(own))))
        nowhere = [self._table.prompts] * (group.rows - len(free))
        rows = np.arange(group.rows, dtype=np.int32)
        shared, self._shared = self._shared, None
        self._shared = self._programs.restore(shared, read, rows, np.array(free + nowhere, np.int32), lengths)

    def _restored(self, group: "_Group", rows: int) -> Cache:
        """A cache of the group's rows, each holding what is kept of its parent."""
        size = bucket_size(max(group.starts) + group.width, _ROOM)
        self.stats.prefill_tokens_reused += sum(group.starts)
        wanted = {
            row: (str(own[0].parent), start)
            for row, (own, start) in enumerate(zip(group.forks, group.starts, strict=True))
            if start
        }
        return self._shelves.restored(self._programs.empty_cache(rows, size), wanted)

    def _collect(
        self, running: dict[int, _Running], drawn: Drawn, admitted: list[_Admitted]
    ) -> list[tuple[int, Completion]]:
        """Take what the slots drew; give back the requests that ended."""
        for group in admitted:
            for index, place in enumerate(group.places):
                running[place].tokens.append(int(group.tokens[index]))
                running[place].logprobs.append(float(group.logprobs[index]))
        tokens, logprobs, counts, runs = drawn.tokens, drawn.logprobs, drawn.drawn, drawn.running
        found = []
        steps = 0
        for place, one in running.items():
            new = int(counts[place]) - len(one.tokens)
            steps = max(steps, new)
            one.tokens += tokens[place, :new].tolist()
            one.logprobs += logprobs[place, :new].tolist()
            completion = self._ended(one, bool(runs[place]))
            if completion is not None:
                found.append((place, completion))
            kept = len(one.tokens) if completion is None else len(completion.tokens)
            self.stats.used_steps += max(kept - (len(one.tokens) - new), 0)
        self.stats.slot_steps += steps * self._settings.slots
        self.stats.requests += len(found)
        self.stats.new_tokens += sum(len(completion.tokens) for _, completion in found)
        self._halt([place for place, done in found if done.finish == "stop_string" and bool(runs[place])])
        return found

    def _ended(self, one: _Running, runs: bool) -> Completion | None:
        """A request's completion if it has ended by what it has drawn."""
        by_token = not runs and one.tokens[-1] in self._rules.stop_tokens
        if self._stops is not None:
            content = one.tokens[:-1] if by_token else one.tokens
            count = self._stops.first(content, one.checked)
            one.checked = len(content)
            if count is not None:
                # What was drawn behind it until the host looked is dropped.
                return Completion(one.request.id, tuple(one.tokens[:count]), tuple(one.logprobs[:count]), "stop_string")
        if runs:
            return None
        finish: Finish = "stop_token" if by_token else "length"
        return Completion(one.request.id, tuple(one.tokens), tuple(one.logprobs), finish)

    def _bucket(self, count: int) -> int:
        """How many rows a program has for `count` prompts or requests.

        As many as a refill usually needs, or as there are slots: two programs serve.
        """
        usual = -(-self._settings.slots // _REFILLED)
        return self._even(usual if count <= usual else self._batch)

    def _even(self, count: int) -> int:
        """As many rows or more, split evenly over the devices."""
        return -(-count // self._rows) * self._rows

    def _halt(self, places: list[int]) -> None:
        if places:
            padded = places + [self._batch] * (self._batch - len(places))
            self._slots = self._programs.halt(self._taken(), np.array(padded, np.int32))

    def _set_aside(self, ended: list[tuple[int, _Running]]) -> None:
        """Copy the caches of those that asked for it, before their slots are given away."""
        # The last token drawn is not in the cache.
        keeping = [
            (place, one.request.id, (*one.request.prompt, *one.tokens[:-1])) for place, one in ended if one.request.keep
        ]
        if keeping:
            assert self._slots is not None, "a request that ended had a slot"
            self._shelves.keep(self._slots.cache, keeping)

    def _taken(self) -> Slots:
        """The slots, for a program that is given their memory."""
        assert self._slots is not None, "slots are made before they are used"
        slots, self._slots = self._slots, None
        return slots

    def _limit(self, request: Request) -> int:
        return self._rules.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


@dataclasses.dataclass(frozen=True)
class _Group:
    """Prompts that one program reads.

    width: the tokens that each is padded to. rows: the prompts that the program reads, padding included. starts: how
    many of each one's tokens are known already. forks: the requests of each.
    """

    width: int
    rows: int
    starts: list[int]
    forks: list[list[Request]]

    @property
    def requests(self) -> list[Request]:
        return [request for own in self.forks for request in own]


def generate(
    params: Params,
    config: LlamaConfig,
    requests: Sequence[Request],
    rules: SamplingRules,
    settings: Settings,
    *,
    seed: int,
    prefix_tokens: Sequence[int],
    stops: StopStrings | None = None,
    stats: Stats | None = None,
) -> Iterator[Completion]:
    """Continue every request, in their order; each is given as soon as it and those before it have finished.

    Args:
        params: the model's tree.
        config: the model's shape.
        requests: what to continue.
        rules: how to draw and when to stop.
        settings: how the engine runs.
        seed: with the ids, the source of all randomness.
        prefix_tokens: what every request saw before its prompt, computed once; may be empty.
        stops: strings that end a completion.
        stats: is added to, when given.

    Raises:
        InputError: see `Engine.run`.
    """
    engine = Engine(params, config, rules, settings, seed=seed, prefix_tokens=prefix_tokens, stops=stops)
    if stats is not None:
        engine.stats = stats
    return in_order(requests, engine.run(requests))


def in_order(requests: Sequence[Request], completions: Iterator[Completion]) -> Iterator[Completion]:
    """Completions in the order of their requests; the run they come from is over before the last of them is given."""
    early: dict[str, Completion] = {}
    given = 0
    for request in requests:
        while request.id not in early:
            completion = next(completions)
            early[completion.id] = completion
            given += 1
        if given == len(requests):
            # Nothing more comes, but what a run does at its end.
            collections.deque(completions, maxlen=0)
        yield early.pop(request.id)
