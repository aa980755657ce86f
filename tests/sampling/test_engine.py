"""Requests through the engine: the same whatever stands beside them, different from each other."""

from typing import Any

import jax
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, logical_axes
from almost_jax.core.partitioning import make_mesh, shardings
from almost_jax.errors import InputError
from almost_jax.sampling.engine import Completion, Request, generate, request_key
from almost_jax.sampling.sampler import SamplingRules, sample
from almost_jax.sampling.scoring import completion_logprobs

PREFIX = (1, 5, 9, 30, 2)
RULES = SamplingRules(temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=7, stop_tokens=(3, 11))


def ask(count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(f"query-{index}", tuple(rng.integers(0, 37, rng.integers(1, 14)).tolist())) for index in range(count)
    ]


def run(params: Any, config: LlamaConfig, requests: list[Request], **changed: Any) -> list[Completion]:
    given = {"seed": 5, "prefix_tokens": PREFIX, "batch_size": 4, "prompt_multiple": 8, "rules": RULES, **changed}
    chosen = given.pop("rules")
    return list(generate(params, config, requests, chosen, **given))


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
        run(params, tiny, requests, batch_size=1),
        run(params, tiny, requests, batch_size=16, prompt_multiple=3),
    ):
        assert by_id(other) == by_id(expected)
    assert by_id(run(params, tiny, requests[6:7])) == {"query-6": expected[6].tokens}


def test_05_tokens_are_the_same_under_a_mesh(shardable: LlamaConfig, make_params: Any) -> None:
    params = make_params(shardable, 2)
    requests = ask(9, 1)
    expected = run(params, shardable, requests, batch_size=8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(logical_axes(shardable), mesh))
        found = run(placed, shardable, requests, batch_size=8)
    assert by_id(found) == by_id(expected)


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
    [row] = run(jax.device_put(flat), tiny, candidates[:1], rules=rules, batch_size=1)
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


def test_few_programs_are_compiled_and_kept(tiny: LlamaConfig, make_params: Any) -> None:
    rules = SamplingRules(0.83, 1.0, 0, 3, (1,))
    requests = [Request(str(length), tuple(range(1, length + 1))) for length in range(1, 17)]
    before = sample._cache_size()
    run(make_params(tiny, 1), tiny, requests, rules=rules)
    assert sample._cache_size() - before == 2, "one program for prompts of 1..8 tokens, one for 9..16"
    run(make_params(tiny, 3), tiny, requests[:13], rules=rules, seed=8)
    assert sample._cache_size() - before == 2


def test_completions_come_as_batches_finish(tiny: LlamaConfig, make_params: Any, monkeypatch: Any) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return sample(*args)

    monkeypatch.setattr("almost_jax.sampling.engine.sample", counted)
    stream = generate(
        make_params(tiny, 1), tiny, ask(9, 0), RULES, seed=5, prefix_tokens=(), batch_size=4, prompt_multiple=16
    )
    next(stream)
    assert len(calls) == 1
    assert len(list(stream)) == 8 and len(calls) == 3


def test_bad_requests_are_refused_before_anything_runs(tiny: LlamaConfig) -> None:
    def refuse(match: str, *requests: Request, prefix_tokens: tuple[int, ...] = (1,)) -> None:
        with pytest.raises(InputError, match=match):
            generate({}, tiny, requests, RULES, seed=0, prefix_tokens=prefix_tokens, batch_size=4, prompt_multiple=8)

    refuse("'a' has an empty prompt", Request("a", ()))
    refuse("'a' is given twice", Request("a", (1,)), Request("a", (2,)))
    refuse("'b' holds token 37, but the model's vocabulary is 0..36", Request("b", (1, 37)))
    refuse("prefix holds token -1", Request("b", (1,)), prefix_tokens=(-1,))
    refuse("prefix 1 [+] prompt 2041 [+] max_new_tokens 7 = 2049", Request("c", (1,) * 2041))
    assert list(generate({}, tiny, [], RULES, seed=0, prefix_tokens=(), batch_size=4, prompt_multiple=8)) == []
