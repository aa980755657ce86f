"""Splash attention: causal attention on a TPU in blocks, without an array of T x T scores.

The kernel is JAX's own (`jax.experimental.pallas.ops.tpu.splash_attention`). The compiler can't split it over devices,
so with more than one it must run inside `jax.shard_map`, as `core.gathering` does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# Rows of queries and keys that a block holds; the kernel's lanes are 128 wide.
LANES = 128
BLOCK = 512


def splash_attention(queries: Array, keys: Array, values: Array, segment_ids: Array, interpret: bool = False) -> Array:
    """Causal softmax attention within segments, scaled by H**-0.5.

    The kernel takes rows of a multiple of 128 tokens. Others are padded for it on the right, where causality keeps the
    padding from every real token, and the result is cut back.

    Args:
        queries: [B, T, N, H].
        keys, values: [B, T, K, H]; N is a multiple of K.
        segment_ids: [B, T] int32; a token sees the earlier tokens of its own segment.
        interpret: run the kernel's Python on any platform, slowly; for tests.

    Returns:
        [B, T, N, H] in the dtype of `queries`.
    """
    _, length, heads, size = queries.shape
    extra = -length % LANES
    attend: Any = _kernel(heads, length + extra, interpret)
    scaled = (queries.astype(jnp.float32) * size**-0.5).astype(queries.dtype)
    first = (
        _longer(jnp.swapaxes(x, 1, 2), 2, extra)
        for x in (scaled, keys.astype(queries.dtype), values.astype(queries.dtype))
    )
    segment_ids = _longer(segment_ids, 1, extra)
    segments: Any = kernel.SegmentIds(segment_ids, segment_ids)
    mixed: Array = jax.vmap(attend)(*first, segments)
    return jnp.swapaxes(mixed[:, :, :length], 1, 2).astype(queries.dtype)


def _longer(x: Array, axis: int, extra: int) -> Array:
    """Zeros behind the end of an axis."""
    return jnp.pad(x, [(0, extra if dim == axis else 0) for dim in range(x.ndim)]) if extra else x


def _kernel(heads: int, length: int, interpret: bool) -> Any:
    block = max(size for size in range(LANES, min(BLOCK, length) + 1, LANES) if length % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)])
    make = functools.partial(kernel.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    return make(mask=mask, block_sizes=sizes)
