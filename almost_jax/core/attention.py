"""Grouped-query attention over a row's own keys and, without copying them, over those that rows share.

All rows may share a prefix, and some of them a prompt.

Letters: B batch, T query time, S key time, P shared-prefix time, N query heads, K key/value heads, G = N / K, H head
size, Q prompts, M rows that go on from a prompt.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

# Finite, so that a row in which nothing may be seen (padding) stays finite instead of NaN.
MASKED = -1e30
# Queries of a long row that `causal_attention` takes together.
QUERY_BLOCK = 128


@struct.dataclass
class Seating:
    """Which rows go on from which prompts.

    members: [Q, M] int32, the rows of each prompt, each row once; B where there is none. seats: [B] int32, the place of
    each row in `members`, counted along its rows; Q M for one that goes on from none. visible: [Q, S] bool, which
    places of each prompt hold a token.
    """

    members: Array
    seats: Array
    visible: Array

    def gathered(self, rows: Array) -> Array:
        """What rows [B, K, ...] have, prompt by prompt: [Q, K, M, ...], 0 where there is no row."""
        return jnp.moveaxis(jnp.take(rows, self.members, axis=0, mode="fill", fill_value=0), 1, 2)

    def returned(self, found: Array, missing: float) -> Array:
        """The inverse: [Q, K, M, ...] -> [B, K, ...], `missing` for rows that go on from no prompt."""
        seated = jnp.moveaxis(found, 2, 1)
        flat = seated.reshape(-1, *seated.shape[2:])
        return jnp.take(flat, self.seats, axis=0, mode="fill", fill_value=missing)


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    prefix: tuple[Array, Array] | None = None,
    prompts: tuple[Array, Array] | None = None,
    seating: Seating | None = None,
) -> Array:
    """Softmax attention, scaled by H**-0.5, with float32 softmax.

    Attention over the prefix is one matrix product for the whole batch: the prefix has no batch dimension. Attention
    over a prompt is one for all rows that go on from it. The parts are merged exactly, under one maximum and one
    denominator (Hydragen, arXiv 2402.05099).

    Args:
        queries: [B, T, N, H].
        keys: [B, K, H, S], the row's own, of the queries' dtype or a wider one; N is a multiple of K.
        values: [B, K, S, H], of the keys' dtype.
        mask: [B, T, S] bool, True where a query may see a key.
        prefix: keys [K, H, P] and values [K, P, H] that every query may see, of the queries' dtype.
        prompts: keys [Q, K, H, S] and values [Q, K, S, H] that some rows share, of the dtype of `keys`.
        seating: says which rows; given with `prompts`.

    Returns:
        [B, T, N, H] in the dtype of `queries`.

    Raises:
        ValueError: N is not a multiple of K.
    """
    n, h = queries.shape[2:]
    k = keys.shape[1]
    if n % k:
        raise ValueError(f"{n} query heads can't be shared by {k} key/value heads: one must divide the other")
    scale = jnp.float32(h**-0.5)
    # Heads first, as the cache has them, so that nothing long is transposed. Keys with their places last take a CPU
    # half the time of keys with H last.
    grouped = _heads_first(queries, k)

    own = jnp.einsum("bktgh,bkhs->bktgs", grouped.astype(keys.dtype), keys, preferred_element_type=jnp.float32) * scale
    own = jnp.where(mask[:, None, :, None], own, MASKED)
    peak = own.max(axis=-1)
    if prefix is not None:
        first = jnp.swapaxes(grouped, 0, 1)
        shared = jnp.einsum("kbtgh,khp->kbtgp", first, prefix[0], preferred_element_type=jnp.float32) * scale
        peak = jnp.maximum(peak, jnp.swapaxes(shared.max(axis=-1), 0, 1))
    if prompts is not None:
        assert seating is not None, "prompts come with their rows"
        asked = seating.gathered(grouped.astype(prompts[0].dtype))
        known = jnp.einsum("qkmtgh,qkhs->qkmtgs", asked, prompts[0], preferred_element_type=jnp.float32) * scale
        known = jnp.where(seating.visible[:, None, None, None, None, :], known, MASKED)
        peak = jnp.maximum(peak, seating.returned(known.max(axis=-1), MASKED))
    peak = jax.lax.stop_gradient(peak)

    weights = jnp.exp(own - peak[..., None])
    total = weights.sum(axis=-1)
    mixed = jnp.einsum(
        "bktgs,bksh->bktgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    if prefix is not None:
        shared_weights = jnp.exp(shared - jnp.swapaxes(peak, 0, 1)[..., None])
        total = total + jnp.swapaxes(shared_weights.sum(axis=-1), 0, 1)
        shared_mixed = jnp.einsum(
            "kbtgp,kph->kbtgh", shared_weights.astype(prefix[1].dtype), prefix[1], preferred_element_type=jnp.float32
        )
        mixed = mixed + jnp.swapaxes(shared_mixed, 0, 1)
    if prompts is not None and seating is not None:
        known_weights = jnp.exp(known - seating.gathered(peak)[..., None])
        total = total + seating.returned(known_weights.sum(axis=-1), 0)
        known_mixed = jnp.einsum(
            "qkmtgs,qksh->qkmtgh",
            known_weights.astype(prompts[1].dtype),
            prompts[1],
            preferred_element_type=jnp.float32,
        )
        mixed = mixed + seating.returned(known_mixed, 0)
    mixed = mixed / total[..., None]
    return _heads_last(mixed.astype(queries.dtype))


def causal_attention(queries: Array, keys: Array, values: Array, mask: Array | None = None) -> Array:
    """Causal attention of rows that stand alone, a block of queries at a time over the keys that it may see.

    Of long rows up to half of the products of `attention` under a causal mask, and scores that fit into a processor's
    cache. The gradient computes the weights anew from the row's log-sum-exp instead of keeping them (FlashAttention,
    arXiv 2205.14135), by products in the orders that a CPU has kernels for. A single block is left to `attention`.

    Args:
        queries: [B, T, N, H].
        keys: [B, K, H, T].
        values: [B, K, T, H].
        mask: [B, T, T] bool, the causal one or less than that, in which every query sees itself; None: the causal one.

    Returns:
        [B, T, N, H] in the dtype of `queries`.
    """
    if queries.shape[1] > QUERY_BLOCK:
        return _by_blocks(queries, keys, values, mask)
    if mask is None:
        mask = causal_mask(jnp.zeros(queries.shape[:2], jnp.int32))
    return attention(queries, keys, values, mask)


@jax.custom_vjp
def _by_blocks(queries: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    return _causal_forward(queries, keys, values, mask)[0]


def _spans(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _heads_first(x: Array, kv_heads: int) -> Array:
    """[B, T, N, H] -> [B, K, T, G, H]."""
    b, t, n, h = x.shape
    return jnp.moveaxis(x.reshape(b, t, kv_heads, n // kv_heads, h), 2, 1)


def _heads_last(x: Array) -> Array:
    """[B, K, T, G, H] -> [B, T, N, H]."""
    b, k, t, g, h = x.shape
    return jnp.moveaxis(x, 1, 2).reshape(b, t, k * g, h)


def _scores(grouped: Array, keys: Array, scale: float, mask: Array | None, start: int) -> Array:
    """Scaled and masked scores [B, K, T, G, S] of a block of queries that begins at `start`, float32."""
    length, seen = grouped.shape[2], keys.shape[-1]
    found = jnp.einsum("bktgh,bkhs->bktgs", grouped, keys, preferred_element_type=jnp.float32)
    found = found * jnp.float32(scale)
    if mask is None:
        visible = (start + jnp.arange(length)[:, None] >= jnp.arange(seen)[None, :])[None, None, :, None]
    else:
        visible = mask[:, start : start + length, :seen][:, None, :, None]
    return jnp.where(visible, found, MASKED)


def _causal_forward(queries: Array, keys: Array, values: Array, mask: Array | None) -> tuple[Array, Any]:
    grouped, scale = _heads_first(queries, keys.shape[1]), queries.shape[-1] ** -0.5
    outputs, logsumexps = [], []
    for start, end in _spans(queries.shape[1]):
        scores = _scores(grouped[:, :, start:end], keys[..., :end], scale, mask, start)
        peak = scores.max(axis=-1)
        weights = jnp.exp(scores - peak[..., None])
        total = weights.sum(axis=-1)
        mixed = jnp.einsum(
            "bktgs,bksh->bktgh",
            weights.astype(values.dtype),
            values[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        outputs.append(mixed / total[..., None])
        logsumexps.append(peak + jnp.log(total))
    output = _heads_last(jnp.concatenate(outputs, axis=2)).astype(queries.dtype)
    return output, (queries, keys, values, mask, output, jnp.concatenate(logsumexps, axis=2))


def _causal_backward(kept: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    queries, keys, values, mask, output, logsumexp = kept
    dtype, kv_heads = queries.dtype, keys.shape[1]
    scale = queries.shape[-1] ** -0.5
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    grouped, slopes = _heads_first(queries, kv_heads), _heads_first(gradient, kv_heads)
    means = _heads_first(gradient.astype(jnp.float32) * output.astype(jnp.float32), kv_heads).sum(axis=-1)
    length = queries.shape[1]
    to_queries = []
    # Both with their places last, where a product has the long side of what it is made from.
    to_keys, to_values = (jnp.zeros(keys.shape, jnp.float32) for _ in range(2))
    for start, end in _spans(length):
        q, slope = grouped[:, :, start:end], slopes[:, :, start:end]
        # Twice the queries by half the scale, the same numbers: else a CPU's compiler sees that these products were
        # there before, and keeps them (a barrier it drops too early).
        scores = _scores(2 * q, keys[..., :end], scale / 2, mask, start)
        weights = jnp.exp(scores - logsumexp[:, :, start:end, :, None])
        to_weights = einsum("bktgh,bksh->bktgs", slope, values[:, :, :end])
        to_scores = (weights * (to_weights - means[:, :, start:end, :, None]) * jnp.float32(scale)).astype(dtype)
        to_queries.append(einsum("bktgs,bkhs->bktgh", to_scores, keys[..., :end]))
        rest = [(0, 0)] * 3 + [(0, length - end)]
        to_keys = to_keys + jnp.pad(einsum("bktgh,bktgs->bkhs", q, to_scores), rest)
        to_values = to_values + jnp.pad(einsum("bktgh,bktgs->bkhs", slope, weights.astype(dtype)), rest)
    return (
        _heads_last(jnp.concatenate(to_queries, axis=2)).astype(dtype),
        to_keys.astype(keys.dtype),
        jnp.swapaxes(to_values, 2, 3).astype(values.dtype),
        None,
    )


_by_blocks.defvjp(_causal_forward, _causal_backward)


def causal_mask(positions: Array, segment_ids: Array | None = None, seen_ids: Array | None = None) -> Array:
    """Which of a row's own tokens each of them may see: itself and what came before, in its own segment.

    Args:
        positions: [B, T] positions within the row, or within the segment when rows are packed.
        segment_ids: [B, T], equal within a packed example; None when a row is one example.
        seen_ids: [B, T], with `segment_ids`: one more segment of which a token sees what came before.

    Returns:
        [B, T, T] bool.
    """
    length = positions.shape[1]
    order = jnp.arange(length)
    mask = jnp.broadcast_to((order[:, None] >= order[None, :])[None], (positions.shape[0], length, length))
    if segment_ids is not None:
        seen = segment_ids[:, :, None] == segment_ids[:, None, :]
        if seen_ids is not None:
            seen = seen | (seen_ids[:, :, None] == segment_ids[:, None, :])
        mask = mask & seen
    return mask


def cache_mask(starts: Array, queries: int, slots: int) -> Array:
    """Which cache slots each new token may see: those before it in its own row, and its own.

    Args:
        starts: [B] how many slots of each row were filled before the new tokens.
        queries: T, the number of new tokens.
        slots: S, the length of the cache.

    Returns:
        [B, T, S] bool.
    """
    ends = starts[:, None] + jnp.arange(queries)[None, :]
    return jnp.arange(slots)[None, None, :] <= ends[:, :, None]
