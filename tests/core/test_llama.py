"""The model against a float64 oracle in plain numpy, and every way of running it against the full forward pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core import llama, rotary
from almost_jax.core.layers import LlamaConfig, Params, RMSNorm
from almost_jax.core.partitioning import lowering_for
from almost_jax.core.rotary import RopeConfig

MakeParams = Callable[[LlamaConfig, int], Params]
ROPES = {
    "default": RopeConfig(theta=1234.0),
    "linear": RopeConfig(theta=1234.0, kind="linear", factor=2.5),
    "llama3": RopeConfig(
        theta=1234.0,
        kind="llama3",
        factor=7.0,
        low_freq_factor=1.5,
        high_freq_factor=5.0,
        original_max_position_embeddings=200,
    ),
}


def oracle_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """One frequency at a time, by the cases of the Llama 3.1 release."""
    out = []
    for index in range(head_dim // 2):
        frequency = rope.theta ** (-2.0 * index / head_dim)
        if rope.kind == "linear":
            frequency /= rope.factor
        elif rope.kind == "llama3":
            wavelength = 2 * np.pi / frequency
            longest = rope.original_max_position_embeddings / rope.low_freq_factor
            shortest = rope.original_max_position_embeddings / rope.high_freq_factor
            if wavelength > longest:
                frequency /= rope.factor
            elif wavelength > shortest:
                smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
        out.append(frequency)
    return np.array(out, np.float64)


def oracle_rotate(x: np.ndarray, positions: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """[T, heads, H] by complex multiplication of the pairs (i, i + H / 2)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, None] * oracle_frequencies(rope, x.shape[-1])[None])
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def oracle_logits(params: Params, c: LlamaConfig, tokens: np.ndarray) -> np.ndarray:
    """One row [T] -> logits [T, V] in float64, a head and a position at a time."""
    p: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    positions = np.arange(len(tokens), dtype=np.float64)
    x = p["embedding"][tokens]
    for layer in range(c.num_layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"])
        h = norm(x, w["attention_norm"]["scale"])
        q, k, v = (np.einsum("td,dnh->tnh", h, w["attention"][name]["kernel"]) for name in ("query", "key", "value"))
        q, k = oracle_rotate(q, positions, c.rope), oracle_rotate(k, positions, c.rope)
        mixed = np.zeros_like(q)
        for head in range(c.num_heads):
            kv = head // (c.num_heads // c.num_kv_heads)
            for t in range(len(tokens)):
                weights = np.exp(k[: t + 1, kv] @ q[t, head] / np.sqrt(c.head_dim))
                mixed[t, head] = weights / weights.sum() @ v[: t + 1, kv]
        x = x + np.einsum("tnh,nhd->td", mixed, w["attention"]["output"]["kernel"])
        h = norm(x, w["mlp_norm"]["scale"])
        gate, up = h @ w["mlp"]["gate"]["kernel"], h @ w["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp"]["down"]["kernel"]
    x = norm(x, p["norm"]["scale"])
    return x @ (p["embedding"].T if c.tie_embeddings else p["lm_head"]["kernel"])


# Compiled once for each configuration and shape.
hidden_states = jax.jit(llama.hidden_states, static_argnames="config")
logits = jax.jit(llama.logits, static_argnames="config")
continued = jax.jit(llama.hidden_states_cached, static_argnames="config")


def full_logits(params: Params, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    return logits(params, config, hidden_states(params, config, tokens))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_01_logits_equal_a_numpy_oracle(
    tiny: LlamaConfig, make_params: MakeParams, rope: RopeConfig, kv_heads: int, tied: bool
) -> None:
    config = dataclasses.replace(tiny, rope=rope, num_kv_heads=kv_heads, tie_embeddings=tied, num_layers=2)
    params = make_params(config, 3)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (2, 11)).astype(np.int32)
    found = np.asarray(full_logits(params, config, jnp.asarray(tokens)))
    expected = np.stack([oracle_logits(params, config, row) for row in tokens])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rotary_frequencies_and_rotation_equal_the_oracle(rope: RopeConfig, head_dim: int) -> None:
    found = np.asarray(rotary.rope_frequencies(rope, head_dim))
    np.testing.assert_allclose(found, oracle_frequencies(rope, head_dim), rtol=2e-6)
    x = np.random.default_rng(0).normal(size=(5, 3, head_dim)).astype(np.float32)
    positions = np.array([0, 1, 5, 90, 91])
    rotated = rotary.rotate(jnp.asarray(x)[None], jnp.asarray(positions, jnp.int32)[None], rope)[0]
    np.testing.assert_allclose(np.asarray(rotated), oracle_rotate(x, positions, rope), atol=1e-4)


def test_llama3_scaling_has_all_three_of_its_cases() -> None:
    """The oracle test above would be empty if no frequency were kept, blended or divided."""
    ratio = oracle_frequencies(ROPES["llama3"], 64) / oracle_frequencies(ROPES["default"], 64)
    assert np.isclose(ratio, 1).any() and np.isclose(ratio, 1 / 7).any() and ((ratio > 0.15) & (ratio < 0.99)).any()


@pytest.mark.parametrize("scan", [True, False])
def test_theta_reaches_the_rotary_embedding(tiny: LlamaConfig, make_params: MakeParams, scan: bool) -> None:
    config = dataclasses.replace(tiny, scan_layers=scan)
    params = make_params(config, 0)
    other = dataclasses.replace(config, rope=RopeConfig(theta=10000.0))
    tokens = jnp.arange(9, dtype=jnp.int32)[None]
    difference = jnp.abs(full_logits(params, config, tokens) - full_logits(params, other, tokens)).max(axis=(0, 2))
    assert difference[0] < 1e-5, "nothing is rotated at position 0"
    assert (difference[2:] > 1e-3).all()


def test_norm_adds_eps_to_the_mean_square() -> None:
    x = np.array([[[3e-2, -1e-2, 2e-2]]], np.float32)
    scale = np.array([1.5, -0.5, 2.0], np.float32)
    found = RMSNorm(1e-3).apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(found), x / np.sqrt((9e-4 + 1e-4 + 4e-4) / 3 + 1e-3) * scale, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("prefix_length", [0, 4])
def test_03_cached_decoding_equals_the_full_forward_pass(
    tiny: LlamaConfig, make_params: MakeParams, scan: bool, prefix_length: int
) -> None:
    """Prefill of ragged prompts, a ragged second turn, then single tokens, with and without a shared prefix."""
    stacked = make_params(tiny, 1)
    config = dataclasses.replace(tiny, scan_layers=scan)
    params = stacked if scan else llama.unstack_layers(stacked, tiny.num_layers)
    rng = np.random.default_rng(2)
    prefix_tokens = rng.integers(0, tiny.vocab_size, prefix_length)
    turns = [np.array([5, 2, 3]), np.array([1, 0, 4]), *[np.array([1, 1, 1])] * 3]
    rows = [rng.integers(0, tiny.vocab_size, int(sum(turn[b] for turn in turns))) for b in range(3)]

    shared = None
    if prefix_length:
        shared = llama.prefill_prefix(params, config, jnp.asarray(prefix_tokens, jnp.int32))
        assert shared.length == prefix_length
    cache = llama.empty_cache(config, 3, 12)
    parts: list[list[np.ndarray]] = [[], [], []]
    done = np.zeros(3, int)
    for turn in turns:
        width = int(turn.max())
        tokens = np.full((3, width), 9, np.int32)  # a real word as padding: it must not matter
        for b in range(3):
            tokens[b, : turn[b]] = rows[b][done[b] : done[b] + turn[b]]
        hidden, cache = continued(
            params, config, jnp.asarray(tokens), cache, jnp.asarray(turn, jnp.int32), prefix=shared
        )
        out = np.asarray(logits(params, config, hidden))
        for b in range(3):
            parts[b].extend(out[b, : turn[b]])
        done += turn
    np.testing.assert_array_equal(np.asarray(cache.lengths), done)

    for b in range(3):
        whole = np.concatenate([prefix_tokens, rows[b]]).astype(np.int32)
        expected = np.asarray(full_logits(stacked, tiny, jnp.asarray(whole)[None]))[0, prefix_length:]
        np.testing.assert_allclose(np.stack(parts[b]), expected, atol=2e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_03_full_pass_over_a_shared_prefix_equals_concatenation(
    tiny: LlamaConfig, make_params: MakeParams, scan: bool
) -> None:
    stacked = make_params(tiny, 4)
    config = dataclasses.replace(tiny, scan_layers=scan)
    params = stacked if scan else llama.unstack_layers(stacked, tiny.num_layers)
    rng = np.random.default_rng(4)
    prefix, rows = rng.integers(0, 37, 5).astype(np.int32), rng.integers(0, 37, (2, 6)).astype(np.int32)
    shared = llama.prefill_prefix(params, config, jnp.asarray(prefix))
    found = hidden_states(params, config, jnp.asarray(rows), prefix=shared)
    joined = jnp.asarray(np.concatenate([np.tile(prefix, (2, 1)), rows], axis=1))
    expected = hidden_states(stacked, tiny, joined)[:, 5:]
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=2e-5)


def test_packed_rows_equal_separate_rows(tiny: LlamaConfig, make_params: MakeParams) -> None:
    params = make_params(tiny, 6)
    rng = np.random.default_rng(6)
    first, second = rng.integers(0, 37, 4).astype(np.int32), rng.integers(0, 37, 7).astype(np.int32)
    packed = jnp.asarray(np.concatenate([first, second]))[None]
    segments = jnp.asarray([0] * 4 + [1] * 7, jnp.int32)[None]
    positions = jnp.asarray([*range(4), *range(7)], jnp.int32)[None]
    found = hidden_states(params, tiny, packed, positions=positions, segment_ids=segments)[0]
    expected = [hidden_states(params, tiny, jnp.asarray(row)[None])[0] for row in (first, second)]
    np.testing.assert_allclose(np.asarray(found), np.concatenate(expected), atol=2e-5)


def test_unstacked_layers_are_the_same_model(tiny: LlamaConfig, make_params: MakeParams) -> None:
    params = make_params(tiny, 7)
    loose = llama.unstack_layers(params, tiny.num_layers)
    unrolled = dataclasses.replace(tiny, scan_layers=False)
    assert jax.tree.structure(loose) == jax.tree.structure(llama.abstract_params(unrolled))
    tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    found, expected = full_logits(loose, unrolled, tokens), full_logits(params, tiny, tokens)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_rows_that_share_a_prompt_equal_rows_that_hold_it(
    tiny: LlamaConfig, make_params: MakeParams, scan: bool
) -> None:
    config = dataclasses.replace(tiny, scan_layers=scan)
    params = make_params(config, 8)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, config.vocab_size, (2, 9)), jnp.int32)
    prefix = llama.prefill_prefix(params, config, tokens[0, :4])
    lengths = jnp.asarray([9, 6])
    _, read = continued(params, config, tokens, llama.empty_cache(config, 2, 12), lengths, prefix=prefix)
    # Row 0 goes on from prompt 1, rows 1 and 3 from prompt 0, row 2 from none.
    prompts = llama.Prompts(read, jnp.asarray([[3, 1], [0, 4]]), jnp.asarray([2, 1, 4, 0]))
    sources, new = jnp.asarray([1, 0, 0, 0]), jnp.asarray([[7, 8], [1, 2], [3, 4], [5, 6]], jnp.int32)
    keys, values = jax.tree.map(
        lambda leaf: leaf[:, sources] if scan else leaf[sources], (read.keys, read.values)
    )
    copied = llama.Cache(keys, values, jnp.asarray([6, 9, 0, 9]))
    own = llama.empty_cache(config, 4, 3)
    for column in range(2):
        step = new[:, column : column + 1], jnp.ones(4, jnp.int32)
        expected, copied = continued(params, config, step[0], copied, step[1], prefix=prefix)
        found, own = continued(params, config, step[0], own, step[1], prefix=prefix, prompts=prompts)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert own.lengths.tolist() == [2, 2, 2, 2]


def products(program: Any) -> int:
    """How many matrix products a jaxpr holds, those of a function that is called twice counted twice."""
    inner = [part for one in program.eqns for part in jax.tree.leaves(list(one.params.values()))]
    within = [getattr(part, "jaxpr", part) for part in inner if hasattr(part, "jaxpr") or hasattr(part, "eqns")]
    return sum(one.primitive.name == "dot_general" for one in program.eqns) + sum(map(products, within))


@pytest.mark.parametrize(("scan", "remat"), [(True, "full"), (False, "full"), (True, "dots")])
def test_remat_changes_neither_loss_nor_gradients(
    tiny: LlamaConfig, make_params: MakeParams, scan: bool, remat: str
) -> None:
    config = dataclasses.replace(tiny, scan_layers=scan)
    params = make_params(config, 8)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

    def loss(params: Params, config: LlamaConfig) -> jax.Array:
        return jnp.square(jax.nn.softmax(full_logits(params, config, tokens))).sum()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    again = dataclasses.replace(config, remat=remat)
    plain, saved = grad(params, config), grad(params, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, saved)
    # Products in the gradient beyond those of a pass forward and back: attention's alone, or nearly all of the pass.
    counts = {
        name: products(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, shape).jaxpr)
        for name, shape in (("plain", config), ("again", again))
    }
    layers = 1 if scan else config.num_layers
    assert counts["again"] - counts["plain"] == {"full": 8, "dots": 2}[remat] * layers


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits(
    tiny: LlamaConfig, make_params: MakeParams, tied: bool
) -> None:
    tiny = dataclasses.replace(tiny, tie_embeddings=tied)
    config = dataclasses.replace(tiny, dtype="bfloat16")
    params = make_params(config, 9)
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    hidden = hidden_states(params, config, tokens)
    found = logits(params, config, hidden)
    assert hidden.dtype == jnp.bfloat16 and found.dtype == jnp.float32
    assert np.any(np.asarray(found) != np.asarray(found.astype(jnp.bfloat16), np.float32)), "logits were rounded"
    # A CPU, where this runs, can't update a cache of bfloat16 in place.
    assert llama.empty_cache(config, 2, 3).keys.dtype == jnp.float32
    with lowering_for("tpu"):
        assert jax.eval_shape(lambda: llama.empty_cache(config, 2, 3)).keys.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    close = full_logits(params, tiny, tokens)
    assert 0 < jnp.abs(found - close).max() < 0.5


@pytest.mark.parametrize(
    ("scan", "remat", "packed", "dtype"),
    [(True, "full", True, "float32"), (False, "none", False, "float32"), (True, "dots", False, "bfloat16"),
     (False, "none", True, "bfloat16")],
)  # fmt: skip
def test_training_by_blocks_is_training_under_the_mask(
    tiny: LlamaConfig, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch,
    scan: bool, remat: str, packed: bool, dtype: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("almost_jax.core.attention.QUERY_BLOCK", 4)
    config = dataclasses.replace(tiny, scan_layers=scan, remat=remat, dtype=dtype)
    params = make_params(config, 6)
    rng = np.random.default_rng(6)
    tokens = jnp.asarray(rng.integers(0, tiny.vocab_size, (2, 11)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(2, 11, tiny.vocab_size)), jnp.float32)
    segments = jnp.asarray([[0] * 6 + [1] * 5, [0] * 3 + [1] * 8]) if packed else None
    positions = jnp.asarray([[*range(6), *range(5)], [*range(3), *range(8)]]) if packed else None

    def loss(params: Params, attention: str) -> jax.Array:
        shape = dataclasses.replace(config, attention=attention)
        hidden = hidden_states(params, shape, tokens, positions=positions, segment_ids=segments)
        return (logits(params, shape, hidden) * weights).mean()

    (blocks, ours), (plain, theirs) = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, name) for name in ("blocks", "plain")
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(blocks, plain, atol=tolerance)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=tolerance * max(1.0, float(jnp.abs(other).max())))


def test_every_layer_is_initialised_differently(tiny: LlamaConfig) -> None:
    kernel = np.asarray(llama.init_params(tiny, jax.random.key(0))["layers"]["mlp"]["gate"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    assert abs(kernel.std() - tiny.initializer_range) < 0.02


@pytest.mark.parametrize("scan", [True, False])
def test_logical_axes_stand_beside_every_parameter(tiny: LlamaConfig, scan: bool) -> None:
    config = dataclasses.replace(tiny, scan_layers=scan)
    axes = llama.logical_axes(config)
    shapes = llama.abstract_params(config)
    jax.tree.map(
        lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim),
        shapes,
        axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    assert axes["embedding"] == ("vocab", "embed")
    if scan:
        assert axes["layers"]["attention"]["key"]["kernel"] == ("layers", "embed", "kv_heads", "head_dim")


def test_configurations_that_cannot_be_run_are_refused(tiny: LlamaConfig) -> None:
    with pytest.raises(ValueError, match="num_heads 6 must be a multiple of num_kv_heads 4"):
        dataclasses.replace(tiny, num_kv_heads=4)
    with pytest.raises(ValueError, match="head_dim 7 must be even"):
        dataclasses.replace(tiny, head_dim=7)
    with pytest.raises(ValueError, match="'yarn'"):
        RopeConfig(kind="yarn")


def test_unstacking_has_the_gradient_of_its_slices(tiny: LlamaConfig, make_params: MakeParams) -> None:
    params = make_params(tiny, 2)

    def sliced(tree):
        rest = {name: part for name, part in tree.items() if name != "layers"}
        return {**rest, **{f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], tree["layers"]) for i in range(3)}}  # noqa: B023

    def weighed(tree):
        return sum(jnp.sum(jnp.sin(leaf) * (3 + place)) for place, leaf in enumerate(jax.tree.leaves(tree)))

    left = jax.grad(lambda tree: weighed(llama.unstack_layers(tree, 3)))(params)
    right = jax.grad(lambda tree: weighed(sliced(tree)))(params)
    assert jax.tree.structure(left) == jax.tree.structure(params)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


def test_a_table_of_rotations_rotates_as_positions_do() -> None:
    rope = rotary.RopeConfig(theta=1234.0, kind="linear", factor=3.0)
    x = jax.random.normal(jax.random.key(0), (2, 9, 3, 10))
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4], [8, 7, 6, 5, 4, 3, 2, 1, 0]], jnp.int32)
    cos, sin = (jnp.asarray(part) for part in rotary.rotary_table(rope, 10, 9))
    found = rotary.rotate(x, (cos[positions], sin[positions]), rope)
    np.testing.assert_allclose(found, rotary.rotate(x, positions, rope), atol=1e-6)
    plain = rotary.rotate(x, (cos[None], sin[None]), rope)
    counted = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    np.testing.assert_allclose(plain, rotary.rotate(x, counted, rope), atol=1e-6)
    assert float(jnp.abs(plain - found).max()) > 0.1
