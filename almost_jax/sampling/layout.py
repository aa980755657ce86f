"""How a model's parameters lie while it samples: unrolled layers, and on a CPU the outputs of every matrix first."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from almost_jax.core.llama import LlamaConfig, Params, cast_matrices, unstack_layers

_unstack_layers = jax.jit(unstack_layers, static_argnames="num_layers")
_cast = jax.jit(cast_matrices, static_argnames="dtype")


def decode_layout(params: Params, config: LlamaConfig, platform: str) -> tuple[Params, LlamaConfig]:
    """The tree and config to decode with on a platform: layers unrolled on "cpu", as they are elsewhere.

    A scan over layers copies the cache in and out at every layer, which costs a CPU more than the larger program does.
    Works inside jit; a prefix must be computed with what this returns.
    """
    if platform != "cpu" or not config.scan_layers:
        return params, config
    return _unstack_layers(params, config.num_layers), dataclasses.replace(config, scan_layers=False)


def sampling_layout(params: Params, config: LlamaConfig, platform: str) -> tuple[Params, LlamaConfig]:
    """The tree and config that the engine samples with: layers unrolled, and on "cpu" kernels with outputs first.

    Matrices are stored in the compute dtype, so that no step reads or converts more than it multiplies by. A CPU
    multiplies few rows by a matrix at up to twice the speed when the contracted dimension lies together and is long
    (LOG.md has figures); a copy of the kernels is what it costs, and a tied head becomes a kernel too (`lm_head`, the
    config no longer tied). Its embedding is float32. Other devices choose layouts by themselves.
    """
    if config.out_in:
        return params, config
    if params["embedding"].dtype != config.dtype:
        params = _cast(params, config.dtype)
    if platform != "cpu":
        # A scan that is given a cache and gives one back holds it twice on a TPU (LOG.md).
        return decode_layout(params, config, "cpu")
    table = params["embedding"]
    head = {"lm_head": {"kernel": table}} if config.tie_embeddings else {}
    # Looked up in float32: a CPU gathers floats of two bytes by converting the whole table first.
    lookup = {"embedding": table.astype("float32")}
    rest = _turned({name: tree for name, tree in params.items() if name != "embedding"}, config)
    return {**rest, **head, **lookup}, dataclasses.replace(
        config, scan_layers=False, tie_embeddings=False, out_in=True
    )


@functools.partial(jax.jit, static_argnames="config")
def _turned(params: Params, config: LlamaConfig) -> Params:
    """Unrolled layers, every kernel with its output dimensions first; a scalar head stays as it is."""

    def turn(path: Any, leaf: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or len(names) < 2 or names[-2] == "score":
            return leaf
        # The output projection of attention contracts its two dimensions of heads, every other kernel its first one.
        contracted = 2 if names[-2] == "output" else 1
        return jnp.moveaxis(leaf, tuple(range(contracted)), tuple(range(-contracted, 0)))

    # In one program with the turning, so that the weights are copied once.
    return jax.tree_util.tree_map_with_path(turn, decode_layout(params, config, "cpu")[0])
