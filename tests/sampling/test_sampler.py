"""The decoding loop against the full forward pass, one token at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, Params, Prefix, logical_axes, prefill_prefix
from almost_jax.core.losses import token_logprobs
from almost_jax.core.partitioning import make_mesh, shardings
from almost_jax.sampling import sampler
from almost_jax.sampling.sampler import Samples, SamplingRules, decode_layout, sample

LENGTHS = (1, 7, 4, 2, 7)
PREFIX = (3, 19, 0, 11, 30, 2, 8, 1, 1, 25, 6)


def rules(temperature: float, max_new_tokens: int, stop_tokens: tuple[int, ...] = (), **changed: Any) -> SamplingRules:
    return SamplingRules(temperature, changed.get("top_p", 1.0), changed.get("top_k", 0), max_new_tokens, stop_tokens)


def prompts(config: LlamaConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts [5, 7] whose padding is garbage, not zeros."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    return tokens, np.array(LENGTHS, np.int32)


def keys(seed: int, count: int = len(LENGTHS)) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def rescored(predictions: np.ndarray, tokens: list[int], temperature: float) -> np.ndarray:
    """The trainer's log-probs of the last tokens of a row, from its logits [T, V]."""
    before = predictions[-len(tokens) - 1 : -1]
    return np.asarray(token_logprobs(jnp.asarray(before)[None], jnp.asarray([tokens], jnp.int32), temperature)[0])


def row_of(samples: Samples, row: int) -> list[int]:
    return np.asarray(samples.tokens)[row, : int(samples.lengths[row])].tolist()


@pytest.fixture(params=["scanned", "unrolled"])
def model(request: pytest.FixtureRequest, tiny: LlamaConfig, make_params: Any) -> tuple[Params, LlamaConfig]:
    params = make_params(tiny, 1)
    return decode_layout(params, tiny, "cpu") if request.param == "unrolled" else (params, tiny)


def test_decode_layout_unrolls_on_cpu_alone(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    unrolled, config = decode_layout(params, tiny, "cpu")
    assert not config.scan_layers and set(unrolled) - set(params) == {"layers_0", "layers_1"}
    again, same = decode_layout(unrolled, config, "cpu")
    assert again is unrolled and same is config
    kept, same = decode_layout(params, tiny, "tpu")
    assert kept is params and same is tiny


@pytest.mark.parametrize("with_prefix", [False, True])
def test_03_07_every_position_equals_the_full_forward_pass(
    model: tuple[Params, LlamaConfig], with_prefix: bool, full_logits: Any
) -> None:
    params, config = model
    tokens, lengths = prompts(config, 2)
    shared = list(PREFIX) if with_prefix else []
    prefix = prefill_prefix(params, config, jnp.asarray(PREFIX, jnp.int32)) if with_prefix else None
    drawn = sample(params, config, tokens, lengths, keys(3), prefix, rules(0.7, 9, (5, 17), top_p=0.9, top_k=20))
    assert len({int(n) for n in drawn.lengths}) > 1, "rows should end at different places"
    for row, length in enumerate(lengths):
        new = row_of(drawn, row)
        before = shared + tokens[row, :length].tolist()
        expected = rescored(full_logits(params, config, before + new), new, 0.7)
        np.testing.assert_allclose(drawn.logprobs[row, : len(new)], expected, atol=1e-4)
        assert bool(drawn.stopped[row]) == (new[-1] in (5, 17))
        assert not set(new[:-1]) & {5, 17}
        assert len(new) == 9 or drawn.stopped[row]


@pytest.mark.parametrize("with_prefix", [False, True])
def test_06_greedy_cached_equals_greedy_uncached(
    model: tuple[Params, LlamaConfig], with_prefix: bool, full_logits: Any
) -> None:
    params, config = model
    tokens, lengths = prompts(config, 4)
    prefix = prefill_prefix(params, config, jnp.asarray(PREFIX, jnp.int32)) if with_prefix else None
    drawn = sample(params, config, tokens, lengths, keys(0), prefix, rules(0.0, 6))
    for row, length in enumerate(lengths):
        seen = (list(PREFIX) if with_prefix else []) + tokens[row, :length].tolist()
        expected = []
        for _ in range(6):
            expected.append(int(full_logits(params, config, seen + expected)[-1].argmax()))
        assert row_of(drawn, row) == expected
    assert not drawn.stopped.any()


def test_06_a_row_depends_on_its_key_and_prompt_alone(tiny: LlamaConfig, make_params: Any) -> None:
    params, config = decode_layout(make_params(tiny, 1), tiny, "cpu")
    tokens, lengths = prompts(config, 5)
    chosen = rules(1.0, 8, (5,))
    together = sample(params, config, tokens, lengths, keys(1), None, chosen)
    order = np.array([3, 0, 4, 2, 1])
    moved = sample(params, config, tokens[order], lengths[order], keys(1)[order], None, chosen)
    np.testing.assert_array_equal(moved.tokens, np.asarray(together.tokens)[order])
    wider = np.pad(tokens, ((0, 0), (0, 5)), constant_values=9)
    padded = sample(params, config, wider, lengths, keys(1), None, chosen)
    np.testing.assert_array_equal(padded.tokens, together.tokens)
    for row in range(len(lengths)):
        alone = sample(params, config, tokens[[row]], lengths[[row]], keys(1)[jnp.array([row])], None, chosen)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=1e-5)


def test_finished_rows_do_not_change(tiny: LlamaConfig, make_params: Any) -> None:
    params = make_params(tiny, 1)
    tokens, lengths = prompts(tiny, 6)
    stops = tuple(range(0, 37, 5))
    short = sample(params, tiny, tokens, lengths, keys(2), None, rules(1.0, 4, stops))
    long = sample(params, tiny, tokens, lengths, keys(2), None, rules(1.0, 12, stops))
    assert short.stopped.any() and int(long.lengths.max()) > 4
    for row in range(len(lengths)):
        length = int(long.lengths[row])
        assert not np.asarray(long.tokens)[row, length:].any()
        assert not np.asarray(long.logprobs)[row, length:].any()
        assert (np.asarray(long.logprobs)[row, :length] < 0).all()
        assert row_of(short, row) == row_of(long, row)[:4]
        assert bool(short.stopped[row]) == (length <= 4 and bool(long.stopped[row]))


def test_08_masks_come_from_lengths_when_the_stop_token_is_the_padding(
    tiny: LlamaConfig, make_params: Any, full_logits: Any
) -> None:
    """Token 0 pads prompts and samples, ends a completion, and stands inside prompts and at their ends."""
    config = dataclasses.replace(tiny, vocab_size=5)
    params = make_params(config, 8)
    rows = [[3, 0, 0], [0], [2, 0, 1, 4], [0, 0, 0, 0, 0]]
    tokens = np.zeros((4, 6), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    drawn = sample(params, config, tokens, lengths, keys(9, 4), None, rules(1.0, 10, (0,)))
    assert drawn.stopped.sum() >= 2
    for place, row in enumerate(rows):
        new = row_of(drawn, place)
        assert (new[-1] == 0) == bool(drawn.stopped[place]) and 0 not in new[:-1]
        expected = rescored(full_logits(params, config, row + new), new, 1.0)
        np.testing.assert_allclose(drawn.logprobs[place, : len(new)], expected, atol=1e-4)


def test_first_token_frequencies_are_the_models(tiny: LlamaConfig, make_params: Any, full_logits: Any) -> None:
    """Through the whole program: second tokens too follow the model given the first."""
    params, config = make_params(tiny, 1), tiny
    count = 8000
    prompt = np.broadcast_to(np.array([4, 12, 7], np.int32), (count, 3))
    drawn = sample(params, config, prompt, np.full(count, 3, np.int32), keys(4, count), None, rules(1.0, 2))
    first, second = np.asarray(drawn.tokens).T
    likely = int(np.bincount(first).argmax())
    for seen, given in [(first, []), (second[first == likely], [likely])]:
        shares = np.bincount(seen, minlength=config.vocab_size) / len(seen)
        expected = np.asarray(jax.nn.softmax(jnp.asarray(full_logits(params, config, [4, 12, 7, *given])[-1])))
        # Six standard deviations of the frequency of any one token, and its share is far from flat.
        assert (np.abs(shares - expected) < 6 * np.sqrt(expected * (1 - expected) / len(seen)) + 1e-3).all()
        assert expected.max() > 3 / config.vocab_size


def test_the_loop_ends_with_its_longest_row(
    tiny: LlamaConfig, make_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params(tiny, 1)
    tokens, lengths = prompts(tiny, 6)
    steps: list[int] = []
    real = sampler.draw

    def counted(*args: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return real(*args)

    monkeypatch.setattr(sampler, "draw", counted)
    # Without jit's cache: the counted program must not be kept for other tests.
    drawn = sample.__wrapped__(
        params, tiny, jnp.asarray(tokens), jnp.asarray(lengths), keys(2), None, rules(1.0, 50, tuple(range(0, 37, 3)))
    )
    jax.effects_barrier()
    assert len(steps) == int(drawn.lengths.max()) < 50


def test_the_prefix_is_never_copied_per_row(model: tuple[Params, LlamaConfig]) -> None:
    params, config = model
    tokens, lengths = prompts(config, 2)
    prefix = prefill_prefix(params, config, jnp.asarray(PREFIX, jnp.int32))
    lowered = sample.lower(params, config, tokens, lengths, keys(0), prefix, rules(1.0, 3))
    rows, shared = len(lengths), len(PREFIX)
    heads = f"{config.num_kv_heads}x{config.head_dim}"
    assert f"{shared}x{heads}" in lowered.as_text()
    assert f"{rows}x{shared}x{heads}" not in lowered.as_text()
    assert f"[{rows},{shared},{config.num_kv_heads},{config.head_dim}]" not in lowered.compile().as_text()


MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 2, 4)]


@pytest.mark.parametrize(
    ("shape", "unrolled"), [*((shape, False) for shape in MESHES), ((2, 2, 2), True), ((1, 1, 8), True)]
)
def test_05_samples_are_the_same_on_eight_devices(
    shardable: LlamaConfig, make_params: Any, shape: tuple[int, int, int], unrolled: bool
) -> None:
    """Inside another jit, as PPO calls it, with layers unrolled there."""
    params = make_params(shardable, 7)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 40, (16, 6)), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, 7, 16), jnp.int32)
    row_keys = keys(5, 16)
    chosen = rules(0.9, 7, (3, 8), top_p=0.95)

    @jax.jit
    def rollout(params: Params, prefix_tokens: jax.Array, tokens: jax.Array, lengths: jax.Array) -> Samples:
        tree, config = decode_layout(params, shardable, "cpu" if unrolled else "tpu")
        prefix: Prefix = prefill_prefix(tree, config, prefix_tokens)
        return sample(tree, config, tokens, lengths, row_keys, prefix, chosen)

    shared = jnp.asarray(PREFIX, jnp.int32)
    expected = rollout(params, shared, tokens, lengths)
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(logical_axes(shardable), mesh))
        found = rollout(placed, shared, tokens, lengths)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.stopped, expected.stopped)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    assert expected.stopped.any() and not expected.stopped.all()
