"""Attention over a row's own keys and a shared prefix, and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core import attention as module
from almost_jax.core.attention import Seating, attention, cache_mask, causal_attention, causal_mask

B, T, S, P, N, K, H = 2, 3, 5, 4, 6, 2, 4


def draw(scale: float) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(11), 5)
    shapes = [(B, T, N, H), (B, K, H, S), (B, K, S, H), (K, H, P), (K, P, H)]
    return tuple(scale * jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))


def concatenated(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, pk: jax.Array, pv: jax.Array) -> jax.Array:
    def join(prefix: jax.Array, own: jax.Array, axis: int) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(prefix[None], (B, *prefix.shape)), own], axis=axis)

    return attention(q, join(pk, k, -1), join(pv, v, -2), jnp.concatenate([jnp.ones((B, T, P), bool), mask], axis=2))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_prompts_that_rows_share_equal_a_copy_for_each_row(with_prefix: bool) -> None:
    rng = np.random.default_rng(4)
    rows, width = 5, 6

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(3 * rng.normal(size=shape), jnp.float32)

    q, k, v = normal(rows, T, N, H), normal(rows, K, H, S), normal(rows, K, S, H)
    known_k, known_v = normal(3, K, H, width), normal(3, K, width, H)
    mask = jnp.asarray(rng.random((rows, T, S)) < 0.6).at[..., 0].set(True)
    prefix = (normal(K, H, P), normal(K, P, H)) if with_prefix else None
    # Rows 4 and 1 go on from prompt 0, row 0 from prompt 2, rows 2 and 3 from none; nobody from prompt 1.
    lengths = np.array([4, 0, 6])
    members, seats = np.array([[4, 1], [5, 5], [5, 0]]), np.array([5, 1, 6, 6, 0])
    seating = Seating(jnp.asarray(members), jnp.asarray(seats), jnp.arange(width)[None] < lengths[:, None])
    found = attention(q, k, v, mask, prefix, (known_k, known_v), seating)
    for row, prompt in ((0, 2), (1, 0), (2, None), (3, None), (4, 0)):
        seen = 0 if prompt is None else lengths[prompt]
        place = prompt or 0
        keys = jnp.concatenate([known_k[place, :, :, :seen], k[row]], axis=-1)
        values = jnp.concatenate([known_v[place, :, :seen], v[row]], axis=-2)
        visible = jnp.concatenate([jnp.ones((T, seen), bool), mask[row]], axis=-1)
        expected = attention(q[row][None], keys[None], values[None], visible[None], prefix)[0]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.7, 15.0])
def test_prefix_merge_equals_concatenation_in_value_and_gradient(scale: float) -> None:
    q, k, v, pk, pv = draw(scale)
    mask = jnp.asarray(np.random.default_rng(0).random((B, T, S)) < 0.6)
    mask = mask.at[0, 0].set(False)  # a query that sees the prefix alone
    merged = attention(q, k, v, mask, (pk, pv))
    np.testing.assert_allclose(merged, concatenated(q, k, v, mask, pk, pv), rtol=1e-4, atol=1e-5 * scale)
    weights = jax.random.normal(jax.random.key(1), merged.shape, jnp.float32)
    found = jax.grad(lambda *a: (attention(*a[:3], mask, a[3:]) * weights).sum(), range(5))(q, k, v, pk, pv)
    expected = jax.grad(lambda *a: (concatenated(*a[:3], mask, *a[3:]) * weights).sum(), range(5))(q, k, v, pk, pv)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_attention_equals_a_numpy_oracle() -> None:
    q, k, v, _, _ = (np.asarray(x, np.float64) for x in draw(1.3))
    mask = np.tril(np.ones((B, T, S), bool), 1)
    expected = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // K)
        weights = np.exp(q[b, t, n] @ k[b, kv] / np.sqrt(H)) * mask[b, t]
        expected[b, t, n] = weights @ v[b, kv] / weights.sum()
    q32, k32, v32, _, _ = draw(1.3)
    np.testing.assert_allclose(attention(q32, k32, v32, jnp.asarray(mask)), expected, atol=1e-5)


def test_masked_keys_have_no_influence_and_a_blind_query_stays_finite() -> None:
    q, k, v, _, _ = draw(1.0)
    mask = jnp.ones((B, T, S), bool).at[:, :, 3:].set(False)
    loud = k.at[..., 3:].set(1e4), v.at[:, :, 3:].set(-1e4)
    np.testing.assert_array_equal(attention(q, k, v, mask), attention(q, *loud, mask))
    blind = mask.at[1, 2].set(False)

    def total(q: jax.Array) -> jax.Array:
        return attention(q, k, v, blind).sum()

    assert jnp.isfinite(attention(q, k, v, blind)).all() and jnp.isfinite(jax.grad(total)(q)).all()


@pytest.mark.parametrize("block", [4, 11])
def test_blocks_of_queries_equal_the_causal_mask(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    # 11 queries in blocks of 4, the last one ragged, and in one.
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(B, 11, N, H), (B, K, H, 11), (B, K, 11, H)])
    positions = jnp.broadcast_to(jnp.arange(11)[None], (B, 11))
    mask = causal_mask(positions)
    np.testing.assert_allclose(causal_attention(q, k, v), attention(q, k, v, mask), atol=1e-6)
    packed = causal_mask(positions, jnp.asarray([[0] * 6 + [1] * 5, [0] * 3 + [1] * 8][:B]))
    np.testing.assert_allclose(causal_attention(q, k, v, packed), attention(q, k, v, packed), atol=1e-6)
    assert np.abs(causal_attention(q, k, v, packed) - causal_attention(q, k, v)).max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [3, 4, 10])
def test_gradients_of_blocks_are_those_of_the_mask(monkeypatch: pytest.MonkeyPatch, packed: bool, block: int) -> None:
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(B, 11, N, H), (B, K, H, 11), (B, K, 11, H)])
    positions = jnp.broadcast_to(jnp.arange(11)[None], (B, 11))
    mask = causal_mask(positions, jnp.asarray([[0] * 6 + [1] * 5, [0] * 3 + [1] * 8][:B]) if packed else None)
    slope = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    found = jax.vjp(lambda *x: causal_attention(*x, mask if packed else None), q, k, v)[1](slope)
    expected = jax.vjp(lambda *x: attention(*x, mask), q, k, v)[1](slope)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v, _, _ = draw(1.0)
    with pytest.raises(ValueError, match="5 query heads can't be shared by 2"):
        attention(q[:, :, :5], k, v, jnp.ones((B, T, S), bool))


def test_causal_mask_sees_the_own_segment_up_to_itself() -> None:
    positions = jnp.asarray([[0, 1, 0, 1, 2]], jnp.int32)
    plain = causal_mask(positions)
    np.testing.assert_array_equal(plain[0], np.tril(np.ones((5, 5), bool)))
    segmented = causal_mask(positions, jnp.asarray([[7, 7, 3, 3, 3]], jnp.int32))
    expected = np.zeros((5, 5), bool)
    expected[:2, :2], expected[2:, 2:] = np.tril(np.ones((2, 2), bool)), np.tril(np.ones((3, 3), bool))
    np.testing.assert_array_equal(segmented[0], expected)


def test_cache_mask_sees_filled_slots_and_itself() -> None:
    mask = cache_mask(jnp.asarray([0, 2], jnp.int32), 2, 5)
    expected = [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))
