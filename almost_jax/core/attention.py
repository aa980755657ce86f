"""Grouped-query attention over a row's own keys and, without copying it, over a prefix that all rows share.

Letters: B batch, T query time, S key time, P shared-prefix time, N query heads, K key/value heads, G = N / K, H head
size.
"""

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that a row in which nothing may be seen (padding) stays finite instead of NaN.
MASKED = -1e30
# Queries of a long row that `causal_attention` takes together.
QUERY_BLOCK = 128


def attention(
    queries: Array, keys: Array, values: Array, mask: Array, prefix: tuple[Array, Array] | None = None
) -> Array:
    """Softmax attention, scaled by H**-0.5, with float32 softmax.

    Attention over the prefix is one matrix product for the whole batch: the prefix has no batch dimension. The two
    parts are merged exactly, under one maximum and one denominator (Hydragen, arXiv 2402.05099).

    Args:
        queries: [B, T, N, H].
        keys: [B, K, H, S], the row's own, of the queries' dtype or a wider one; N is a multiple of K.
        values: [B, K, S, H], of the keys' dtype.
        mask: [B, T, S] bool, True where a query may see a key.
        prefix: keys [K, H, P] and values [K, P, H] that every query may see.

    Returns:
        [B, T, N, H] in the dtype of `queries`.

    Raises:
        ValueError: N is not a multiple of K.
    """
    b, t, n, h = queries.shape
    k = keys.shape[1]
    if n % k:
        raise ValueError(f"{n} query heads can't be shared by {k} key/value heads: one must divide the other")
    scale = jnp.float32(h**-0.5)
    # Heads first, as the cache has them, so that nothing long is transposed. Keys with their places last take a CPU
    # half the time of keys with H last.
    grouped = jnp.moveaxis(queries.reshape(b, t, k, n // k, h), 2, 1)

    own = jnp.einsum("bktgh,bkhs->bktgs", grouped.astype(keys.dtype), keys, preferred_element_type=jnp.float32) * scale
    own = jnp.where(mask[:, None, :, None], own, MASKED)
    peak = own.max(axis=-1)
    if prefix is not None:
        first = jnp.swapaxes(grouped, 0, 1)
        shared = jnp.einsum("kbtgh,khp->kbtgp", first, prefix[0], preferred_element_type=jnp.float32) * scale
        peak = jnp.maximum(peak, jnp.swapaxes(shared.max(axis=-1), 0, 1))
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
            "kbtgp,kph->kbtgh", shared_weights.astype(values.dtype), prefix[1], preferred_element_type=jnp.float32
        )
        mixed = mixed + jnp.swapaxes(shared_mixed, 0, 1)
    mixed = mixed / total[..., None]
    return jnp.moveaxis(mixed, 1, 2).astype(queries.dtype).reshape(b, t, n, h)


def causal_attention(queries: Array, keys: Array, values: Array) -> Array:
    """Causal attention of long rows that stand alone, a block of queries at a time over the keys that it may see.

    Half of the products of `attention` under a causal mask, and scores that fit into a processor's cache.

    Args:
        queries: [B, T, N, H].
        keys: [B, K, H, T].
        values: [B, K, T, H].

    Returns:
        [B, T, N, H] in the dtype of `queries`.
    """
    length = queries.shape[1]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        mask = jnp.broadcast_to(mask[None], (queries.shape[0], *mask.shape))
        blocks.append(attention(queries[:, start:end], keys[..., :end], values[:, :, :end], mask))
    return jnp.concatenate(blocks, axis=1)


def causal_mask(positions: Array, segment_ids: Array | None = None) -> Array:
    """Which of a row's own tokens each of them may see: itself and what came before, in its own segment.

    Args:
        positions: [B, T] positions within the row, or within the segment when rows are packed.
        segment_ids: [B, T], equal within a packed example; None when a row is one example.

    Returns:
        [B, T, T] bool.
    """
    length = positions.shape[1]
    order = jnp.arange(length)
    mask = jnp.broadcast_to((order[:, None] >= order[None, :])[None], (positions.shape[0], length, length))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
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
