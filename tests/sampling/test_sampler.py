"""What the engine's programs draw, against the full forward pass, one token at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.llama import Cache, LlamaConfig, Params, hidden_states, logical_axes, logits, prefill_prefix
from almost_jax.core.losses import token_logprobs
from almost_jax.core.partitioning import make_mesh, shardings
from almost_jax.sampling import sampler
from almost_jax.sampling.engine import generate
from almost_jax.sampling.layout import decode_layout, sampling_layout
from almost_jax.sampling.programs import Programs
from almost_jax.sampling.requests import Completion, Request, Settings
from almost_jax.sampling.rules import SamplingRules

PREFIX = (3, 19, 0, 11, 30, 2, 8, 1, 1, 25, 6)
SETTINGS = Settings(slots=5, steps_per_wake=4, refill=True, prefill_tokens=64)


def rules(temperature: float, max_new_tokens: int, stop_tokens: tuple[int, ...] = (), **changed: Any) -> SamplingRules:
    return SamplingRules(temperature, changed.get("top_p", 1.0), changed.get("top_k", 0), max_new_tokens, stop_tokens)


def ask(config: LlamaConfig, seed: int, lengths: Sequence[int] = (1, 7, 4, 2, 7)) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(str(place), tuple(rng.integers(0, config.vocab_size, length).tolist()))
        for place, length in enumerate(lengths)
    ]


def draw(
    model: tuple[Params, LlamaConfig], requests: Sequence[Request], chosen: SamplingRules, **changed: Any
) -> list[Completion]:
    given = {"settings": SETTINGS, "seed": 3, "prefix_tokens": (), **changed}
    return list(generate(*model, requests, chosen, given.pop("settings"), **given))


def rescored(predictions: np.ndarray, tokens: Sequence[int], temperature: float) -> np.ndarray:
    """The trainer's log-probs of the last tokens of a row, from its logits [T, V]."""
    before = predictions[-len(tokens) - 1 : -1]
    return np.asarray(token_logprobs(jnp.asarray(before)[None], jnp.asarray([tokens], jnp.int32), temperature)[0])


@pytest.fixture
def model(tiny: LlamaConfig, make_params: Any) -> tuple[Params, LlamaConfig]:
    return make_params(tiny, 1), tiny


def test_layouts_unroll_and_turn(model: tuple[Params, LlamaConfig]) -> None:
    params, config = model
    unrolled, flat = decode_layout(params, config, "cpu")
    assert not flat.scan_layers and set(unrolled) - set(params) == {"layers_0", "layers_1"}
    again, same = decode_layout(unrolled, flat, "cpu")
    assert again is unrolled and same is flat
    turned, sampling = sampling_layout(params, config, "cpu")
    assert sampling.out_in and not sampling.scan_layers
    np.testing.assert_array_equal(
        turned["layers_1"]["attention"]["output"]["kernel"],
        np.moveaxis(np.asarray(params["layers"]["attention"]["output"]["kernel"])[1], -1, 0),
    )
    kept, same = decode_layout(params, config, "tpu")
    assert kept is params and same is config
    # To sample, layers are unrolled everywhere; where kernels lie is another device's own business.
    elsewhere, sampling = sampling_layout(params, config, "tpu")
    assert not sampling.scan_layers and not sampling.out_in and "layers_1" in elsewhere


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sampling_stores_matrices_in_the_compute_dtype(
    tiny: LlamaConfig, make_params: Any, tied: bool, platform: str
) -> None:
    config = dataclasses.replace(tiny, dtype="bfloat16", tie_embeddings=tied)
    params = make_params(config, 1)
    stored, sampling = sampling_layout(params, config, platform)
    kernels = jax.tree.leaves({name: tree for name, tree in stored.items() if name not in ("embedding", "norm")})
    assert {leaf.dtype.name for leaf in kernels if leaf.ndim > 1} == {"bfloat16"}
    # A CPU gathers from float32, and gets a head of its own where the embedding is the head.
    assert stored["embedding"].dtype == ("float32" if platform == "cpu" else "bfloat16")
    assert sampling.tie_embeddings == (tied and platform != "cpu")
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    pairs = ((stored, sampling), (params, config))
    found, expected = (logits(tree, shape, hidden_states(tree, shape, tokens)) for tree, shape in pairs)
    # Programs are fused otherwise, so that bfloat16 is rounded elsewhere.
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert np.abs(found - expected).mean() < 0.02
    again, same = sampling_layout(stored, sampling, platform)
    assert same == sampling and again["embedding"] is stored["embedding"]


def test_float32_sampling_shares_the_embedding_with_the_head(tiny: LlamaConfig, make_params: Any) -> None:
    config = dataclasses.replace(tiny, tie_embeddings=True)
    stored, sampling = sampling_layout(make_params(config, 1), config, "cpu")
    assert not sampling.tie_embeddings and stored["lm_head"]["kernel"] is stored["embedding"]


def test_07_bfloat16_log_probs_are_the_trainers_but_for_rounding(
    tiny: LlamaConfig, make_params: Any, full_logits: Any
) -> None:
    config = dataclasses.replace(tiny, dtype="bfloat16")
    params = make_params(config, 1)
    for prefix in ((), PREFIX):
        requests = ask(config, 2)
        drawn = draw((params, config), requests, rules(0.7, 9, (5, 17)), prefix_tokens=prefix)
        for request, one in zip(requests, drawn, strict=True):
            found = full_logits(params, config, [*prefix, *request.prompt, *one.tokens])
            np.testing.assert_allclose(one.logprobs, rescored(found, one.tokens, 0.7), atol=0.1)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_03_07_every_position_equals_the_full_forward_pass(
    model: tuple[Params, LlamaConfig], prefix: tuple[int, ...], scanned: bool, full_logits: Any, monkeypatch: Any
) -> None:
    params, config = model
    if scanned:  # as on every other platform
        monkeypatch.setattr("almost_jax.sampling.engine.sampling_layout", lambda tree, shape, platform: (tree, shape))
    requests = ask(config, 2)
    stops = (5, 11, 17, 23, 30)
    drawn = draw(model, requests, rules(0.7, 9, stops, top_p=0.9, top_k=20), prefix_tokens=prefix)
    assert len({len(one.tokens) for one in drawn}) > 1, "rows should end at different places"
    for request, one in zip(requests, drawn, strict=True):
        row = [*prefix, *request.prompt, *one.tokens]
        expected = rescored(full_logits(params, config, row), one.tokens, 0.7)
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)
        assert (one.finish == "stop_token") == (one.tokens[-1] in stops)
        assert not set(one.tokens[:-1]) & set(stops)
        assert one.finish == "length" or len(one.tokens) <= 9
        assert one.finish == "stop_token" or len(one.tokens) == 9


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_06_greedy_cached_equals_greedy_uncached(
    model: tuple[Params, LlamaConfig], prefix: tuple[int, ...], full_logits: Any
) -> None:
    requests = ask(model[1], 4)
    for request, one in zip(requests, draw(model, requests, rules(0.0, 6), prefix_tokens=prefix), strict=True):
        expected: list[int] = []
        for _ in range(6):
            expected.append(int(full_logits(*model, [*prefix, *request.prompt, *expected])[-1].argmax()))
        assert list(one.tokens) == expected and one.finish == "length"


def test_06_greedy_with_a_shared_prefix_equals_greedy_without(model: tuple[Params, LlamaConfig]) -> None:
    requests = ask(model[1], 5)
    whole = [dataclasses.replace(one, prompt=(*PREFIX, *one.prompt)) for one in requests]
    shared = draw(model, requests, rules(0.0, 8), prefix_tokens=PREFIX)
    assert [one.tokens for one in shared] == [one.tokens for one in draw(model, whole, rules(0.0, 8))]


def test_a_longer_limit_changes_nothing_before_it(model: tuple[Params, LlamaConfig]) -> None:
    stops, requests = tuple(range(0, 37, 5)), ask(model[1], 6)
    short, long = (draw(model, requests, rules(1.0, limit, stops)) for limit in (4, 12))
    assert any(one.stopped for one in short) and max(len(one.tokens) for one in long) > 4
    for one, other in zip(short, long, strict=True):
        assert one.tokens == other.tokens[:4] and all(value < 0 for value in other.logprobs)
        assert one.stopped == (len(other.tokens) <= 4 and other.stopped)


def test_08_masks_come_from_lengths_when_the_stop_token_is_the_padding(
    tiny: LlamaConfig, make_params: Any, full_logits: Any
) -> None:
    """Token 0 pads prompts, ends a completion, and stands inside prompts and at their ends."""
    config = dataclasses.replace(tiny, vocab_size=5)
    params = make_params(config, 8)
    rows = [(3, 0, 0), (0,), (2, 0, 1, 4), (0, 0, 0, 0, 0)]
    requests = [Request(str(place), row) for place, row in enumerate(rows)]
    drawn = draw((params, config), requests, rules(1.0, 10, (0,)), seed=9)
    assert sum(one.stopped for one in drawn) >= 2
    for row, one in zip(rows, drawn, strict=True):
        assert (one.tokens[-1] == 0) == one.stopped and 0 not in one.tokens[:-1]
        expected = rescored(full_logits(params, config, [*row, *one.tokens]), one.tokens, 1.0)
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


def test_09_first_token_frequencies_are_the_models(model: tuple[Params, LlamaConfig], full_logits: Any) -> None:
    """Through the whole engine: second tokens too follow the model given the first."""
    count, prompt = 8000, (4, 12, 7)
    requests = [Request(str(place), prompt) for place in range(count)]
    many = Settings(slots=count, steps_per_wake=1, refill=True, prefill_tokens=64)
    first, second = np.array([one.tokens for one in draw(model, requests, rules(1.0, 2), settings=many)]).T
    likely = int(np.bincount(first).argmax())
    for seen, given in [(first, []), (second[first == likely], [likely])]:
        shares = np.bincount(seen, minlength=model[1].vocab_size) / len(seen)
        expected = np.asarray(jax.nn.softmax(jnp.asarray(full_logits(*model, [*prompt, *given])[-1])))
        # Six standard deviations of the frequency of any one token, and its share is far from flat.
        assert (np.abs(shares - expected) < 6 * np.sqrt(expected * (1 - expected) / len(seen)) + 1e-3).all()
        assert expected.max() > 3 / model[1].vocab_size


def test_a_decode_call_ends_with_its_longest_row(
    model: tuple[Params, LlamaConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, config = model
    slots = sampler.empty_slots(config, 3, 16)
    slots = slots.replace(  # type: ignore[attr-defined]
        limits=jnp.asarray([4, 2, 9], jnp.int32), running=jnp.asarray([True, True, False]), drawn=jnp.ones(3, jnp.int32)
    )
    steps: list[int] = []
    real = sampler.draw

    def counted(*args: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return real(*args)

    monkeypatch.setattr(sampler, "draw", counted)
    after, drawn = sampler.decode(params, config, slots, None, None, 8, rules(1.0, 1))
    jax.effects_barrier()
    # One token was there before, so three steps fill the longest of the two that run.
    assert len(steps) == 3 and drawn.drawn.tolist() == [4, 2, 1] and not drawn.running.any()
    assert after.cache.lengths.tolist() == [3, 1, 0]
    assert not np.asarray(drawn.tokens)[2].any() and not np.asarray(drawn.tokens)[:, 3:].any()


def test_the_prefix_is_never_copied_per_row(model: tuple[Params, LlamaConfig]) -> None:
    config = model[1]
    programs = Programs(*model, rules(1.0, 3))
    prefix = programs.prefix(np.array(PREFIX, np.int32))
    slots = programs.empty_slots(5, 16, prefix, None, 4)
    step = jax.jit(sampler.decode, static_argnums=(1, 5, 6))
    lowered = step.lower(model[0], config, slots, prefix, None, 4, rules(1.0, 3))
    heads, size, shared = config.num_kv_heads, config.head_dim, len(PREFIX)
    assert f"{heads}x{size}x{shared}x" in lowered.as_text()
    assert f"5x{heads}x{size}x{shared}x" not in lowered.as_text()
    assert f"[5,{heads},{size},{shared}]" not in lowered.compile().as_text()


def test_rows_are_copied_to_their_places_and_nowhere_else(tiny: LlamaConfig) -> None:
    heads, size = tiny.num_kv_heads, tiny.head_dim
    rng = np.random.default_rng(2)
    own = rng.normal(size=(5, heads, size, 9)).astype(np.float32)
    for width in (4, 9, 12):
        new = rng.normal(size=(3, heads, size, width)).astype(np.float32)
        rows, places = np.array([2, 2, 0, 1, 1], np.int32), np.array([4, 0, 5, 3, 7], np.int32)
        kept = Cache((own,), (own.swapaxes(2, 3),), jnp.zeros(5, jnp.int32))
        other = Cache((new,), (new.swapaxes(2, 3),), jnp.zeros(3, jnp.int32))
        found = jax.jit(sampler.restore)(kept, other, rows, places, np.arange(5, dtype=np.int32))
        expected = own.copy()
        for row, place in ((2, 4), (2, 0), (1, 3)):
            expected[place, :, :, : min(width, 9)] = new[row, :, :, :9]
        np.testing.assert_array_equal(found.keys[0], expected)
        np.testing.assert_array_equal(found.values[0], expected.swapaxes(2, 3))
        np.testing.assert_array_equal(found.lengths, [1, 0, 0, 3, 0])


def test_no_program_computes_rotations_anew(model: tuple[Params, LlamaConfig]) -> None:
    # A CPU's compiler would do so for every head of every layer.
    params, config = sampling_layout(*model, "cpu")
    slots, tokens = sampler.empty_slots(config, 3, 16), jnp.ones((3, 4), jnp.int32)
    shared = prefill_prefix(params, config, tokens[0])

    def read(params: Params, prefix: Any) -> Any:
        return sampler.prefill(params, config, tokens, tokens[:, 0], None, prefix)

    def step(params: Params, prefix: Any) -> Any:
        return sampler.decode(params, config, slots, prefix, None, 2, rules(1.0, 4))

    lowered = [jax.jit(function).lower(params, prefix) for function in (read, step) for prefix in (None, shared)]
    lowered.append(jax.jit(lambda params: prefill_prefix(params, config, tokens[0])).lower(params))
    for program in (one.as_text() for one in lowered):
        assert "dot_general" in program and "cosine" not in program and "sine" not in program


MESHES = [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(8, 1, 1), (1, 8, 1), (1, 1, 8)])]


@pytest.mark.parametrize("shape", MESHES)
def test_05_samples_are_the_same_on_eight_devices(
    shardable: LlamaConfig, make_params: Any, shape: tuple[int, int, int]
) -> None:
    params, requests = make_params(shardable, 7), ask(shardable, 1, (1, 6, 3, 2, 5, 4, 6, 1, 2))
    chosen = rules(0.9, 7, (3, 8, 20, 31), top_p=0.95)
    expected = draw((params, shardable), requests, chosen, prefix_tokens=PREFIX)
    assert {one.finish for one in expected} == {"stop_token", "length"}
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    placed = jax.device_put(params, shardings(logical_axes(shardable), mesh))
    with jax.set_mesh(mesh):
        found = draw((placed, shardable), requests, chosen, prefix_tokens=PREFIX)
    for one, other in zip(found, expected, strict=True):
        assert (one.id, one.tokens, one.finish) == (other.id, other.tokens, other.finish)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
