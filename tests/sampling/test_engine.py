"""Requests through the engine: the same whatever stands beside them, different from each other."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, empty_cache
from almost_jax.core.partitioning import make_mesh
from almost_jax.errors import InputError
from almost_jax.sampling import sampler
from almost_jax.sampling.engine import Engine, generate, in_order
from almost_jax.sampling.keys import request_key
from almost_jax.sampling.programs import room
from almost_jax.sampling.requests import Completion, Request, Settings
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.sampling.stats import Stats
from almost_jax.sampling.stops import StopStrings
from almost_jax.sampling.table import Table, table_for

PREFIX = (1, 5, 9, 30, 2)
SETTINGS = Settings(slots=4, steps_per_wake=3, refill=True, prefill_tokens=32)
RULES = SamplingRules(temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=7, stop_tokens=(3, 11))


def ask(count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(f"query-{index}", tuple(rng.integers(0, 37, rng.integers(1, 14)).tolist())) for index in range(count)
    ]


def run(params: Any, config: LlamaConfig, requests: list[Request], **changed: Any) -> list[Completion]:
    given = {"seed": 5, "prefix_tokens": PREFIX, "settings": SETTINGS, "rules": RULES, **changed}
    rules, settings = given.pop("rules"), given.pop("settings")
    return list(generate(params, config, requests, rules, settings, **given))


def by_id(completions: list[Completion]) -> dict[str, tuple[int, ...]]:
    return {completion.id: completion.tokens for completion in completions}


def test_06_tokens_do_not_depend_on_batch_slot_or_neighbours(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    requests = ask(9, 0)
    expected = run(params, tiny, requests)
    assert [completion.id for completion in expected] == [request.id for request in requests]
    assert {completion.stopped for completion in expected} == {True, False}
    shuffled = [requests[index] for index in (4, 8, 0, 2, 7, 1, 3, 6, 5)]
    for other in (
        run(params, tiny, shuffled),
        run(params, tiny, requests, settings=Settings(1, 7, True, 32)),
        run(params, tiny, requests, settings=Settings(16, 2, False, 256)),
    ):
        assert by_id(other) == by_id(expected)
    assert by_id(run(params, tiny, requests[6:7])) == {"query-6": expected[6].tokens}


def test_07_logprobs_equal_rescoring(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    requests = ask(9, 2)
    for temperature in (0.0, 0.6, 1.7):
        rules = SamplingRules(temperature, 0.9, 15, 7, (3,))
        drawn = run(params, tiny, requests, rules=rules)
        rescored = completion_logprobs(
            params,
            tiny,
            [PREFIX + request.prompt for request in requests],
            [completion.tokens for completion in drawn],
            temperature=temperature,
            batch_size=4,
            multiple=8,
        )
        for completion, expected in zip(drawn, rescored, strict=True):
            assert len(completion.tokens) == len(completion.logprobs)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_10_samples_differ_between_requests_seeds_and_candidates(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    rules = SamplingRules(1.0, 1.0, 0, 10, ())
    candidates = [Request(f"query-0/{index}", (4, 8, 15)) for index in range(8)]
    first = run(params, tiny, candidates, rules=rules)
    assert len({completion.tokens for completion in first}) == 8
    assert not set(by_id(first).values()) & set(by_id(run(params, tiny, candidates, rules=rules, seed=6)).values())
    assert by_id(run(params, tiny, candidates, rules=rules)) == by_id(first)
    later = [Request(f"query-0/{index}/turn-2", (4, 8, 15)) for index in range(8)]
    assert not set(by_id(first).values()) & set(by_id(run(params, tiny, later, rules=rules)).values())
    # Tokens of one row are drawn with different keys: a flat model must not repeat itself.
    flat = jax.tree.map(np.zeros_like, params)
    [row] = run(jax.device_put(flat), tiny, candidates[:1], rules=rules, settings=Settings(1, 3, True, 32))
    assert len(set(row.tokens)) > 4


def test_request_key_is_a_function_of_seed_and_id() -> None:
    # The first two little-endian words of the SHA-256 of "abc", from FIPS 180: ba7816bf 8f01cfea ...
    words = np.array([0xBF1678BA, 0xEACF018F], np.uint32)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), words[0]), words[1])
    assert (jax.random.key_data(request_key(7, "abc")) == jax.random.key_data(expected)).all()
    data = {
        tuple(jax.random.key_data(request_key(seed, name)).tolist()) for seed in (0, 1) for name in ("a", "b", "a ", "")
    }
    assert len(data) == 8


def test_a_completion_knows_its_content(tiny: LlamaConfig, make_params: Any) -> None:
    for completion in run(make_params(tiny, 1), tiny, ask(9, 0)):
        if completion.stopped:
            assert completion.tokens[-1] in RULES.stop_tokens and completion.content == completion.tokens[:-1]
        else:
            assert len(completion.tokens) == 7 and completion.content == completion.tokens


def test_programs_are_compiled_once_and_counted(tiny: LlamaConfig, make_params: Any) -> None:
    rules = SamplingRules(0.83, 1.0, 0, 6, (1,))
    first, second = Stats(), Stats()
    run(make_params(tiny, 1), tiny, ask(9, 3), rules=rules, stats=first)
    run(make_params(tiny, 3), tiny, ask(9, 3), rules=rules, stats=second, seed=8)
    assert first.compile_seconds > 10 * second.compile_seconds and first.requests == second.requests == 9


def test_completions_come_as_they_finish_and_a_slot_is_refilled(tiny: LlamaConfig, make_params: Any) -> None:
    rules = SamplingRules(1.0, 1.0, 0, 40, ())
    limits = (40, 2, 3, 5, 2, 4, 3, 9)
    requests = [Request(str(place), (place + 1,), limit) for place, limit in enumerate(limits)]

    def finished(refill: bool) -> tuple[list[str], Stats]:
        settings = Settings(slots=2, steps_per_wake=2, refill=refill, prefill_tokens=32)
        engine = Engine(make_params(tiny, 1), tiny, rules, settings, seed=5, prefix_tokens=())
        done = list(engine.run(requests))
        assert {one.id: len(one.tokens) for one in done} == {str(place): limit for place, limit in enumerate(limits)}
        return [one.id for one in done], engine.stats

    order, refilled = finished(True)
    # All others pass through the second slot while the first request runs.
    assert order == ["1", "2", "3", "4", "5", "6", "7", "0"]
    order, plain = finished(False)
    assert order[:2] == ["1", "0"]
    assert plain.used_steps == refilled.used_steps == sum(limits) - len(limits)
    assert refilled.slot_steps < plain.slot_steps


def test_forks_read_their_prompt_once_and_the_prefix_is_read_once(tiny: LlamaConfig, make_params: Any) -> None:
    params, prompt = make_params(tiny, 1), (4, 8, 15, 16)
    requests = [Request(f"{query}/{n}", (query, *prompt)) for query in range(3) for n in range(4)]
    stats = Stats()
    settings = Settings(slots=12, steps_per_wake=4, refill=True, prefill_tokens=64)
    forked = run(params, tiny, requests, settings=settings, stats=stats)
    assert stats.prefill_tokens == len(PREFIX) + 3 * 5
    assert stats.report()["prefill_tokens_saved"] == 12 * (len(PREFIX) + 5) - stats.prefill_tokens
    alone = [run(params, tiny, [one])[0] for one in requests]
    assert by_id(forked) == by_id(alone) and len(set(by_id(forked).values())) > 3


def test_a_dialogue_goes_on_from_its_cache(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    engine = Engine(params, tiny, RULES, SETTINGS, seed=5, prefix_tokens=PREFIX)
    opening = [Request(one.id, one.prompt, keep=True) for one in ask(6, 7)]
    first = list(in_order(opening, engine.run(opening)))
    # The next prompt repeats the first one and the answer, at times but for its last tokens, and goes on.
    prompts = [
        (*one.prompt, *done.content[: len(done.content) - place % 2], 9, 21, 4)
        for place, (one, done) in enumerate(zip(opening, first, strict=True))
    ]
    asked = [Request(f"{one.id}/2", prompt, parent=one.id) for one, prompt in zip(opening, prompts, strict=True)]
    before = engine.stats.prefill_tokens
    second = list(in_order(asked, engine.run(asked)))
    fresh = [Request(one.id, one.prompt) for one in asked]
    expected = run(params, tiny, fresh)
    assert by_id(second) == by_id(expected)
    for one, other in zip(second, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    read, whole = engine.stats.prefill_tokens - before, sum(map(len, prompts))
    assert read < whole / 2 and engine.stats.prefill_tokens_reused == whole - read
    engine.forget()
    with pytest.raises(InputError, match="parent 'query-0' was not kept"):
        engine.run(asked[:1])


def test_what_is_kept_lies_close_together_and_its_rows_are_used_again(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    # They end one after the other, a few in each wake.
    limits = [1 + place for place in range(12)]
    settings = Settings(slots=12, steps_per_wake=1, refill=True, prefill_tokens=64)
    rules = dataclasses.replace(RULES, max_new_tokens=12)
    engine = Engine(params, tiny, rules, settings, seed=5, prefix_tokens=PREFIX)
    opening = [
        Request(f"query-{place}", one.prompt, limit, keep=True)
        for place, (one, limit) in enumerate(zip(ask(12, 7), limits, strict=True))
    ]
    first = {one.id: one for one in in_order(opening, engine.run(opening))}
    (shelf,) = engine._shelves.shelves
    assert shelf.cache.lengths.shape == (12,) and shelf.free == []
    # Whatever the order in which they are forgotten.
    engine.forget(one.id for one in opening[3:][::-1])
    freed = list(shelf.free)
    assert len(freed) == 9 and freed == sorted(freed)
    more = [Request(f"more-{place}", one.prompt, 2, keep=True) for place, one in enumerate(ask(9, 7))]
    first |= {one.id: one for one in engine.run(more)}
    assert engine._shelves.shelves == [shelf] and shelf.free == []
    # What was kept all along, and what lies in rows that were used again.
    asked = [
        Request(f"{one.id}/2", (*one.prompt, *first[one.id].content, 9, 21), parent=one.id)
        for one in [*opening[:3], *more]
    ]
    before = engine.stats.prefill_tokens
    found = list(engine.run(asked))
    assert by_id(found) == by_id(run(params, tiny, [Request(one.id, one.prompt) for one in asked], rules=rules))
    assert engine.stats.prefill_tokens - before < sum(len(one.prompt) for one in asked) / 2
    # More than a shelf holds, of which some take the place of what they had kept.
    again = [Request(one.id, one.prompt, 3, keep=True) for one in more[:5]]
    again += [Request(f"again-{place}", one.prompt, 3, keep=True) for place, one in enumerate(ask(9, 8))]
    first |= {one.id: one for one in engine.run(again)}
    assert [len(one.free) for one in engine._shelves.shelves] == [0, 12 - 9]
    asked = [Request(f"{one.id}/3", (*one.prompt, *first[one.id].content, 4), parent=one.id) for one in again]
    found = list(engine.run(asked))
    assert by_id(found) == by_id(run(params, tiny, [Request(one.id, one.prompt) for one in asked], rules=rules))
    engine.forget()
    assert engine._shelves.shelves == []


def test_a_shelf_that_a_failure_has_damaged_goes(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    engine = Engine(params, tiny, RULES, SETTINGS, seed=5, prefix_tokens=PREFIX)
    kept = [dataclasses.replace(one, keep=True) for one in ask(6, 7)]
    list(engine.run(kept))
    restore = engine._programs.restore

    def failing(cache: Any, *rest: Any) -> Any:
        restore(cache, *rest)
        raise KeyboardInterrupt

    engine._programs.restore = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(engine.run([dataclasses.replace(one, id=f"{one.id}/b") for one in kept]))
    engine._programs.restore = restore  # type: ignore[method-assign]
    assert all(not leaf.is_deleted() for shelf in engine._shelves.shelves for leaf in jax.tree.leaves(shelf.cache))
    assert by_id(list(engine.run(kept))) == by_id(run(params, tiny, ask(6, 7)))


def test_a_parent_that_is_forgotten_while_its_child_waits_is_read_again(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    engine = Engine(params, tiny, RULES, SETTINGS, seed=5, prefix_tokens=PREFIX)
    kept = [dataclasses.replace(one, keep=True) for one in ask(6, 7)]
    list(engine.run(kept))
    children = [Request(f"{one.id}/2", (*one.prompt, 9, 21), parent=one.id) for one in kept]
    found = engine.run(children)
    engine.forget()
    assert by_id(list(found)) == by_id(run(params, tiny, [Request(one.id, one.prompt) for one in children]))


def test_rows_are_copied_one_by_one_on_a_single_cpu_with_and_without_a_mesh(tiny: LlamaConfig) -> None:
    unrolled = dataclasses.replace(tiny, scan_layers=False)
    own, kept = empty_cache(unrolled, 4, 16), empty_cache(unrolled, 2, 8)
    places = jnp.array([3, 1], jnp.int32)

    def loops() -> bool:
        return "stablehlo.while" in jax.jit(sampler.restore).lower(own, kept, places, places, places).as_text()

    assert loops()
    for devices in (1, 2):
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:devices])):
            assert loops() == (devices == 1)


def test_a_run_cannot_begin_while_another_goes_on(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    engine = Engine(params, tiny, RULES, SETTINGS, seed=5, prefix_tokens=PREFIX)
    first = engine.run(ask(6, 7))
    begun = [next(first)]
    with pytest.raises(RuntimeError, match="last run still goes on"):
        next(engine.run(ask(3, 4)))
    # The one that went on has lost nothing.
    assert by_id([*begun, *first]) == by_id(run(params, tiny, ask(6, 7)))
    abandoned = engine.run(ask(6, 7))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert by_id(list(engine.run(ask(3, 4)))) == by_id(run(params, tiny, ask(3, 4)))


def test_a_run_is_over_with_its_last_completion_in_order(tiny: LlamaConfig, make_params: Any) -> None:
    engine = Engine(make_params(tiny, 1), tiny, RULES, SETTINGS, seed=5, prefix_tokens=PREFIX)
    completions = in_order(ask(6, 7), engine.run(ask(6, 7)))
    for _ in range(6):
        next(completions)
    assert engine.stats.seconds > 0 and engine._slots is not None
    assert len(list(engine.run(ask(3, 4)))) == 3


def spelled(tokens: Any) -> str:
    """A text of tokens: each spells a few characters, so that strings span them."""
    return "".join(("ab", "c", "\nHu", "man", ":", "x ")[token % 6] for token in tokens)


def test_08_stop_strings_are_found_and_cut_to_the_token(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    rules = SamplingRules(1.3, 1.0, 0, 40, (3,))
    requests = [Request(str(place), (place + 1, 2)) for place in range(12)]
    free = run(params, tiny, requests, rules=rules)
    stops = StopStrings(("\nHuman:", "cab"), spelled)
    met = 0
    for k in (1, 7, 40):
        settings = Settings(slots=4, steps_per_wake=k, refill=True, prefill_tokens=32)
        stopped = run(params, tiny, requests, rules=rules, stops=stops, settings=settings)
        for one, other in zip(stopped, free, strict=True):
            text = spelled(other.content)
            held = [count for count in range(len(other.content) + 1) if _holds(spelled(other.content[:count]))]
            assert _holds(text) == bool(held)
            if held:
                met += 1
                assert one.finish == "stop_string" and one.tokens == other.tokens[: held[0]]
                assert one.logprobs == pytest.approx(other.logprobs[: held[0]], abs=1e-4)
            else:
                assert (one.finish, one.tokens) == (other.finish, other.tokens)
    assert met >= 9
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(("a", ""), spelled)


def byte_decoder(pieces: dict[int, bytes]) -> Callable[[Any], str]:
    """As tokenizers that fall back to bytes decode: a run of them is letters once all are whole, and none before.

    Token 0 is the letter a, the others are the bytes in `pieces`.
    """

    def decode(tokens: Any) -> str:
        text, run = "", b""
        for token in [*tokens, 0]:
            if token:
                run += pieces[token]
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\N{REPLACEMENT CHARACTER}" * len(run)
            text, run = text + "a", b""
        return text[:-1]

    return decode


def test_08_a_letter_that_is_begun_hides_no_stop_before_it() -> None:
    decode = byte_decoder({1: b"\n", 2: b"\xf0", 3: b"\x9f", 4: b"\x98", 5: b"\x80"})
    stops, tokens = StopStrings(("\n",), decode), [0, 1, 2, 3, 4, 5, 0]
    assert decode(tokens) == "a\n\N{GRINNING FACE}a" and "\n" not in decode(tokens[:4])
    for look in range(1, len(tokens)):
        # Wherever the host looks first, and whether it looks again or the sample ends there.
        expected = 2 if look >= 2 else None
        assert stops.first(tokens[:look], 0) == expected


def test_08_a_letter_that_is_never_finished_hides_no_stop_before_it() -> None:
    # LLaMA's line feed is a byte too: behind it a letter that is begun, and then another one.
    decode = byte_decoder({1: b"\n", 2: b"\xf0"})
    stops, tokens = StopStrings(("\n",), decode), [0, 1, 2, 0, 0]
    assert "\n" in decode(tokens[:2]) and "\n" not in decode(tokens)
    assert [stops.first(tokens[:look], 0) for look in range(1, 6)] == [None, 2, 2, 2, 2]


def test_a_run_that_is_left_in_the_middle_leaves_no_slot_behind(tiny: LlamaConfig, make_params: Any) -> None:
    params, requests = make_params(tiny, 1), [Request(str(place), (place + 1, 2)) for place in range(6)]
    settings = Settings(slots=3, steps_per_wake=2, refill=True, prefill_tokens=32)
    rules = SamplingRules(1.3, 1.0, 0, 20, ())
    engine = Engine(params, tiny, rules, settings, seed=3, prefix_tokens=())
    left = engine.run([
        dataclasses.replace(one, id=f"left {place}", max_new_tokens=3 + 3 * place) for place, one in enumerate(requests)
    ])  # fmt: skip
    next(left)
    left.close()
    before = engine.stats.slot_steps
    after = list(in_order(requests, engine.run(requests)))
    fresh = Engine(params, tiny, rules, settings, seed=3, prefix_tokens=())
    assert [one.tokens for one in after] == [one.tokens for one in in_order(requests, fresh.run(requests))]
    assert engine.stats.slot_steps - before == fresh.stats.slot_steps


def sampled(lengths: list[int], samples: list[int], seed: int = 3) -> list[Request]:
    """Prompts of these lengths, each with so many samples, whose limits differ."""
    rng = np.random.default_rng(seed)
    found = []
    for place, (length, count) in enumerate(zip(lengths, samples, strict=True)):
        prompt = tuple(rng.integers(0, 37, length).tolist())
        found += [Request(f"{place}/{index}", prompt, int(rng.integers(1, 8))) for index in range(count)]
    return found


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_06_prompts_that_samples_share_change_no_token(
    tiny: LlamaConfig, make_params: Any, prefix: tuple[int, ...]
) -> None:
    params, settings = make_params(tiny, 1), Settings(slots=16, steps_per_wake=2, refill=True, prefill_tokens=512)
    lengths = [140, 131, 150, 128, 170, 129, 133, 130, 141, 135, 136, 137, 138]
    requests = sampled(lengths, [3, 1, 4, 2, 3, 4, 2, 4, 1, 3, 2, 4, 3])
    limits: Any = {"rules": dataclasses.replace(RULES, max_new_tokens=8), "prefix_tokens": prefix}
    engine = Engine(params, tiny, limits["rules"], settings, seed=5, prefix_tokens=prefix)
    given, real = [], engine._programs.decode

    def decode(slots: Any, prefix: Any, prompts: Any, steps: int) -> Any:
        given.append((room(slots.cache), prompts))
        return real(slots, prefix, prompts, steps)

    engine._programs.decode = decode  # type: ignore[method-assign]
    found = list(in_order(requests, engine.run(requests)))
    # Fewer places than prompts; the slots hold no more than what is drawn.
    assert given and all(size == 64 and prompts.members.shape == (10, 4) for size, prompts in given)
    assert engine.stats.prefill_tokens == len(prefix) + sum(lengths)
    assert engine._table is None and engine._shared is None
    for one in found[::5]:
        [request] = [request for request in requests if request.id == one.id]
        [alone] = run(params, tiny, [request], settings=settings, **limits)
        assert alone.tokens == one.tokens
        np.testing.assert_allclose(alone.logprobs, one.logprobs, atol=1e-4)
    # Samples whose caches are kept have their prompts in them.
    kept = [dataclasses.replace(request, keep=True) for request in requests]
    assert by_id(run(params, tiny, kept, settings=settings, **limits)) == by_id(found)


def test_08_stop_strings_behind_shared_prompts_in_an_engine_used_again(tiny: LlamaConfig, make_params: Any) -> None:
    params, settings = make_params(tiny, 1), Settings(slots=8, steps_per_wake=5, refill=True, prefill_tokens=512)
    rules, stops = SamplingRules(1.3, 1.0, 0, 24, (3,)), StopStrings(("\nHuman:", "cab"), spelled)
    shared = [dataclasses.replace(one, max_new_tokens=24) for one in sampled([130, 140, 128, 129, 150, 133], [2] * 6)]
    apart = [Request(f"apart {place}", (place + 1, 2)) for place in range(6)]

    def engine() -> Engine:
        return Engine(params, tiny, rules, settings, seed=3, prefix_tokens=(), stops=stops)

    # What keeps its cache has its prompt to itself.
    expected = by_id(list(engine().run([dataclasses.replace(one, keep=True) for one in shared])))
    expected |= by_id(list(engine().run(apart)))
    used = engine()
    left = used.run([dataclasses.replace(one, id=f"left {one.id}") for one in shared])
    next(left)
    assert used._table is not None and len(used._table.free()) < used._table.prompts
    left.close()
    assert used._table is None and used._shared is None
    finishes = set()
    for requests in (shared, apart, shared):
        found = list(used.run(requests))
        assert by_id(found) == {one.id: expected[one.id] for one in requests}
        finishes |= {one.finish for one in found}
    assert finishes == {"stop_string", "stop_token", "length"}


def test_a_table_gives_places_to_whole_forks() -> None:
    requests = sampled([130, 140, 150, 160], [3, 2, 4, 2])
    table = Table(4, 4, 8, 160)
    waiting = collections.deque(requests)
    # The third prompt's samples don't fit beside the others.
    assert [one.id for one in table.next(waiting, 6)] == ["0/0", "0/1", "0/2", "1/0", "1/1"]
    table.seat(0, [5, 0, 2])
    table.seat(3, [1, 4])
    assert table.members.tolist() == [[5, 0, 2, 8], [8] * 4, [8] * 4, [1, 4, 8, 8]]
    assert table.seats.tolist() == [1, 12, 2, 16, 13, 0, 16, 16] and table.free() == [1, 2]
    assert table.next(waiting, 1) == []
    table.leave(1)
    assert table.free() == [1, 2]
    table.leave(4)
    assert table.free() == [1, 2, 3] and table.seats[[1, 4]].tolist() == [16, 16]
    assert [one.id for one in table.next(waiting, 6)] == ["2/0", "2/1", "2/2", "2/3", "3/0", "3/1"] and not waiting


def test_prompts_are_shared_only_where_that_gains_something() -> None:
    assert table_for(sampled([130, 140], [2, 2]), 4, 4) is not None
    assert table_for([], 4, 4) is None
    assert table_for(sampled([130, 140], [1, 2]), 4, 4) is None
    assert table_for(sampled([100, 140], [2, 2]), 4, 4) is None
    assert table_for(sampled([130, 140], [2, 5]), 4, 4) is None
    # Many slots would have to be free at once, or most seats be empty.
    assert table_for(sampled([130, 140, 150], [2, 3, 2]), 7, 7) is not None
    assert table_for(sampled([130, 140, 150], [2, 3, 2]), 6, 6) is None
    assert table_for(sampled([130] * 5, [2, 2, 2, 2, 9]), 64, 64) is None
    table = table_for(sampled([130, 161] * 20, [3] * 40), 32, 32)
    assert table is not None and table.members.shape == (16, 3) and table.width == 192
    [first, *rest] = sampled([130, 140], [2, 2])
    for changed in ({"keep": True}, {"parent": "x"}):
        assert table_for([dataclasses.replace(first, **changed), *rest], 4, 4) is None


def test_long_prompts_are_read_by_rows_as_many_as_may_be_read(tiny: LlamaConfig, make_params: Any) -> None:
    engine = Engine(
        make_params(tiny, 1), tiny, SamplingRules(0.8, 1.0, 0, 2, (3,)),
        Settings(slots=32, steps_per_wake=4, refill=True, prefill_tokens=64), seed=5, prefix_tokens=(),
    )  # fmt: skip
    read = []
    real = engine._programs.prefill

    def prefill(tokens: Any, *rest: Any) -> Any:
        read.append(tokens.shape)
        return real(tokens, *rest)

    engine._programs.prefill = prefill  # type: ignore[method-assign]
    # A refill needs 4 rows; of 32 tokens two of them may be read together, of 64 one.
    requests = [Request(str(place), (place + 1, *[5] * (29 + place % 2 * 10))) for place in range(10)]
    assert len(list(engine.run(requests))) == 10
    assert set(read) == {(2, 32), (1, 64)} and len(read) == 3 + 5


def _holds(text: str) -> bool:
    return "\nHuman:" in text or "cab" in text


def test_bad_requests_are_refused_before_anything_runs(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)

    def refuse(match: str, *requests: Request, prefix_tokens: tuple[int, ...] = (1,)) -> None:
        with pytest.raises(InputError, match=match):
            generate(params, tiny, requests, RULES, SETTINGS, seed=0, prefix_tokens=prefix_tokens)

    refuse("'a' has an empty prompt", Request("a", ()))
    refuse("'a' is given twice", Request("a", (1,)), Request("a", (2,)))
    refuse("'b' holds token 37, but the model's vocabulary is 0..36", Request("b", (1, 37)))
    refuse("prefix holds token -1", Request("b", (1,)), prefix_tokens=(-1,))
    refuse("prefix 1 [+] prompt 2041 [+] max_new_tokens 7 = 2049", Request("c", (1,) * 2041))
    refuse("'d': max_new_tokens 8 must be 1 to 7", Request("d", (1,), 8))
    assert list(generate(params, tiny, [], RULES, SETTINGS, seed=0, prefix_tokens=())) == []
    with pytest.raises(ValueError, match="steps_per_wake 0 must be at least 1"):
        Settings(4, 0, True, 32)


@pytest.mark.parametrize(
    ("pieces", "count"),
    [
        (["a", " b.", "\n", "\nHu", "man:"], 2),
        (["a", " b", ".\n\n", "Human", ":"], 3),
        (["Human", ":"], 0),
        (["\n\n", "Human", ":"], 0),
        (["a", "b"], 2),
    ],
)
def test_what_stands_before_a_stop_string_to_the_token(pieces: list[str], count: int):
    stops = StopStrings(("\nHuman:",), lambda tokens: "\n" + "".join(pieces[token] for token in tokens).strip())
    assert stops.before(range(len(pieces))) == count


def test_a_letter_of_several_tokens_before_a_stop_string_is_whole():
    pieces = [b"a", b"\xf0\x9f", b"\x98", b"\x8a", b"\nHu", b"man:"]

    def decode(tokens):
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    assert StopStrings(("\nHuman:",), decode).before(range(6)) == 4
