"""The layers of a LLaMA, and its shape; letters as in `almost_jax.core.llama`, which puts them together."""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from almost_jax.core.attention import attention, causal_attention
from almost_jax.core.gathering import Gather
from almost_jax.core.partitioning import constrain, platform
from almost_jax.core.products import accumulate, contract
from almost_jax.core.rotary import RopeConfig, rotate
from almost_jax.core.splash import splash_attention

Params: TypeAlias = dict[str, Any]

# What is kept of a layer for the backward pass: nothing, or the products with its weights, by their name.
_PRODUCT = "product"
_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT)}
# Up to so many rows a CPU multiplies fastest with the kernel on the left, where its rows are read as they lie.
_FEW_ROWS = 64


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA; frozen and hashable, so that it can be a static argument.

    `dtype` is the compute dtype of matrix products; parameters keep their own. With `scan_layers` the layers'
    parameters and caches are stacked on a leading axis L and the program holds one layer; without, they are tuples
    of trees and the program holds them all (faster to decode on a CPU).

    How a program runs, and not what it computes: `remat` says what of a layer the
    backward pass computes anew: "none" of it, all but its products with weights ("dots"), or "full". `gather` says that
    parameters are a device's parts, inside `jax.shard_map` (see `core.gathering`). `attention` is "plain", or, for rows
    that stand alone, "blocks" (see `attention.causal_attention`) or "splash", a TPU's kernel that never holds a T x T
    array. `vocab_chunk` is how many entries of the vocabulary `core.vocabulary` scores at a time, 0 for all. With
    `out_in` every kernel is stored with its output dimensions first, which a CPU multiplies a few rows by up to twice
    as fast (see `sampling.layout`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    gather: Gather | None = None
    attention: str = "plain"
    vocab_chunk: int = 0
    out_in: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary embeddings")


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich, 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise x [B, T, D] in float32; the result has its dtype."""
        scale: Any = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)), (x.shape[-1],)
        )
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)[None, None, :]).astype(x.dtype)


class Kernel(nn.Module):
    """A matrix without bias, of any rank: contracts the last `contracted` axes of x with its first ones."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stddev: float
    contracted: int = 1
    gather: Gather | None = None
    out_in: bool = False
    wide: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Multiply in the dtype of x; the product has it too, or, where it is to be `wide`, is left in float32."""
        out = jnp.float32 if self.wide else x.dtype
        initializer = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
        last = tuple(range(x.ndim - self.contracted, x.ndim))
        if self.out_in:
            turned = self.shape[self.contracted :] + self.shape[: self.contracted]
            parameter: Any = self.param("kernel", nn.initializers.normal(self.stddev), turned)
            outputs, rows = turned[: -self.contracted], x.shape[: -self.contracted]
            # As matrices: of more dimensions a kernel is transposed before every product.
            kernel = parameter.astype(x.dtype).reshape(math.prod(outputs), -1)
            flat = x.reshape(*rows, kernel.shape[1])
            if math.prod(rows) > _FEW_ROWS:
                product = accumulate(flat, kernel, ((len(rows),), (1,)))
            else:
                product = jnp.moveaxis(accumulate(kernel, flat, ((1,), (len(rows),))), 0, -1)
            return product.astype(out).reshape(*rows, *outputs)
        if self.gather is None:
            kernel = self.param("kernel", initializer, self.shape)
        else:
            parameter = self.param("kernel", initializer, self.gather.local_shape(self.shape, self.axes))
            kernel = self.gather.whole(parameter, self.axes, x.dtype)
        if platform() == "cpu" or self.wide:
            return checkpoint_name(contract(x, kernel, self.contracted, out), _PRODUCT)
        product = jax.lax.dot_general(x, kernel.astype(x.dtype), ((last, tuple(range(self.contracted))), ((), ())))
        return checkpoint_name(product, _PRODUCT)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary embeddings."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Any, starts: Array | None, seating: Any, own: Any, shared: Any
    ) -> tuple[Array, Any]:
        """Attend: x [B, T, D] -> [B, T, D], and the layer's keys and values, written at `starts` into its own cache.

        `mask` is [B, T, S] bool, or [B, T] segment ids where the attention is splash attention; to attention by blocks
        None says that it is causal and no more. `shared` are the layer's prefix and prompts.
        """
        c = self.config
        wide, narrow = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        std, d = c.initializer_range, c.hidden_size
        kernel = functools.partial(Kernel, stddev=std, gather=c.gather, out_in=c.out_in)
        q = kernel((d, *wide), ("embed", "heads", "head_dim"), name="query")(x)
        k = kernel((d, *narrow), ("embed", "kv_heads", "head_dim"), name="key")(x)
        v = kernel((d, *narrow), ("embed", "kv_heads", "head_dim"), name="value")(x)
        q = constrain(rotate(q, positions, c.rope), "rows", "length", "activation_heads", None)
        k = constrain(rotate(k, positions, c.rope), "rows", "length", "activation_kv_heads", None)
        v = constrain(v, "rows", "length", "activation_kv_heads", None)
        prefix, prompts = shared
        alone = own is None and prefix is None
        if alone and c.attention == "splash":
            mixed = splash_attention(q, k, v, mask)
        k, v = jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2)
        if own is not None:
            assert starts is not None, "a cache comes with the slots to write at"
            k = _write(own[0], k.astype(own[0].dtype), starts, -1)
            v = _write(own[1], v.astype(own[1].dtype), starts, -2)
        if alone and c.attention == "blocks":
            mixed = causal_attention(q, k, v, mask)
        elif not (alone and c.attention == "splash"):
            mixed = attention(q, k, v, mask, prefix, prompts, seating)
        mixed = constrain(mixed, "batch", "length", "activation_heads", None)
        axes = ("heads", "head_dim", "embed")
        out = kernel((*wide, d), axes, contracted=2, name="output")(mixed)
        return out, (k, v)


def _write(slots: Array, new: Array, starts: Array, axis: int) -> Array:
    """Write every row's new keys or values [B, K, ...] into its slots, from its start [B] on along an axis."""
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis))(slots, new, starts)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map x [B, T, D] -> [B, T, D]."""
        c = self.config
        shape, axes, std = (c.hidden_size, c.intermediate_size), ("embed", "mlp"), c.initializer_range
        kernel = functools.partial(Kernel, stddev=std, gather=c.gather, out_in=c.out_in)
        gate, up = kernel(shape, axes, name="gate")(x), kernel(shape, axes, name="up")(x)
        hidden = constrain(nn.silu(gate) * up, "batch", "length", "activation_mlp")
        return kernel(shape[::-1], axes[::-1], name="down")(hidden)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Any, starts: Array | None, seating: Any, own: Any, shared: Any
    ) -> tuple[Array, Any]:
        """Map x [B, T, D] -> [B, T, D], with the layer's keys and values."""
        c = self.config
        x = constrain(x, "batch", "length", "activation_embed")
        normed = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        mixed, kept = Attention(c, name="attention")(normed, positions, mask, starts, seating, own, shared)
        x = x + mixed
        x = x + MLP(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x))
        return constrain(x, "batch", "length", "activation_embed"), kept


def block_class(config: LlamaConfig) -> Any:
    """The class of a model's layers."""
    if config.remat == "none":
        return Block
    return nn.remat(Block, prevent_cse=not config.scan_layers, policy=_REMAT_POLICIES[config.remat])


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply_layer(config: LlamaConfig, _platform: str, params: Params, *arguments: Any) -> tuple[Array, Any]:
    """A layer of these parameters, traced once for arguments of a shape; how, `platform()` decides, which is given."""
    out: tuple[Array, Any] = block_class(config)(config, parent=None).apply({"params": params}, *arguments)
    return out
