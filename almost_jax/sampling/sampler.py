"""Prefill and decoding as one program: prompts in, tokens and their log-probs out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from almost_jax.core.llama import (
    Cache,
    LlamaConfig,
    Params,
    Prefix,
    empty_cache,
    hidden_states_cached,
    logits,
    unstack_layers,
)
from almost_jax.core.partitioning import constrain
from almost_jax.sampling.rules import SamplingRules, draw

__all__ = ["Samples", "SamplingRules", "decode_layout", "sample"]

_unstack_layers = jax.jit(unstack_layers, static_argnames="num_layers")


@struct.dataclass
class Samples:
    """What was drawn: G = max_new_tokens columns, of which each row owns the first `lengths`.

    tokens: [B, G] int32, the stop token included, then zeros. logprobs: [B, G] float32, at the sampling temperature
    (1 when greedy) over the whole vocabulary, then zeros. lengths: [B] int32, with the stop token. stopped: [B] bool,
    False where max_new_tokens ended the row.
    """

    tokens: Array
    logprobs: Array
    lengths: Array
    stopped: Array


@struct.dataclass
class _State:
    """The loop's carry. step: scalar int32, columns written; last: [B] int32, the tokens not yet in the cache."""

    step: Array
    last: Array
    cache: Cache
    samples: Samples


@functools.partial(jax.jit, static_argnames=("config", "rules"))
def sample(
    params: Params,
    config: LlamaConfig,
    prompts: Array,
    lengths: Array,
    keys: Array,
    prefix: Prefix | None,
    rules: SamplingRules,
) -> Samples:
    """Continue every prompt until it stops or has max_new_tokens; the program ends when all rows have.

    Token g of a row is drawn with fold_in(row key, g), so it depends on the row's key and prompt alone. Works inside
    another jit and under `jax.set_mesh`.

    Args:
        params: the model's tree, in the layout that `config.scan_layers` says (see `decode_layout`).
        config: the model's shape.
        prompts: [B, T] int32, padded on the right.
        lengths: [B] int32 in 1..T.
        keys: [B] typed keys.
        prefix: what all rows saw before their prompt; read in place, never copied per row.
        rules: how to draw and when to stop.
    """
    batch, width = prompts.shape[0], rules.max_new_tokens
    # The prompt attends to its own slots only; those of the new tokens are added afterwards.
    cache = empty_cache(config, batch, prompts.shape[1])
    hidden, cache = hidden_states_cached(params, config, prompts, cache, lengths, prefix=prefix)
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    nothing = Samples(
        tokens=constrain(jnp.zeros((batch, width), jnp.int32), "batch", None),
        logprobs=constrain(jnp.zeros((batch, width), jnp.float32), "batch", None),
        lengths=constrain(jnp.zeros((batch,), jnp.int32), "batch"),
        stopped=constrain(jnp.zeros((batch,), bool), "batch"),
    )
    start = _State(jnp.zeros((), jnp.int32), nothing.lengths, _grown(cache, width), nothing)

    def emit(state: _State, hidden: Array, cache: Cache) -> _State:
        # Whole rows on every device: drawing then needs no communication and doesn't depend on the mesh.
        last_logits = constrain(logits(params, config, hidden)[:, 0], "batch", None)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        tokens, logprobs = draw(last_logits, step_keys, rules)
        return _State(state.step + 1, tokens, cache, _recorded(state.samples, state.step, tokens, logprobs, rules))

    def unfinished(state: _State) -> Array:
        return (state.step < width) & ~state.samples.stopped.all()

    def advance(state: _State) -> _State:
        running = (~state.samples.stopped).astype(jnp.int32)
        hidden, cache = hidden_states_cached(params, config, state.last[:, None], state.cache, running, prefix=prefix)
        return emit(state, hidden, cache)

    return jax.lax.while_loop(unfinished, advance, emit(start, hidden, start.cache)).samples


def decode_layout(params: Params, config: LlamaConfig, platform: str) -> tuple[Params, LlamaConfig]:
    """The tree and config to decode with on a platform: layers unrolled on "cpu", as they are elsewhere.

    A scan over layers copies the cache in and out at every layer, which costs a CPU more than the larger program does.
    Works inside jit; a prefix must be computed with what this returns.
    """
    if platform != "cpu" or not config.scan_layers:
        return params, config
    return _unstack_layers(params, config.num_layers), dataclasses.replace(config, scan_layers=False)


def _recorded(samples: Samples, step: Array, tokens: Array, logprobs: Array, rules: SamplingRules) -> Samples:
    """Write one column; rows that had stopped keep their zeros, length and stop."""
    running = ~samples.stopped
    stops = jnp.asarray(rules.stop_tokens, jnp.int32)
    ended = (tokens[:, None] == stops[None, :]).any(axis=1)

    def write(columns: Array, column: Array) -> Array:
        column = jnp.where(running, column, jnp.zeros((), column.dtype))
        return jax.lax.dynamic_update_slice_in_dim(columns, column[:, None], step, axis=1)

    return Samples(
        tokens=write(samples.tokens, tokens),
        logprobs=write(samples.logprobs, logprobs),
        lengths=samples.lengths + running.astype(jnp.int32),
        stopped=samples.stopped | ended,
    )


def _grown(cache: Cache, slots: int) -> Cache:
    """The cache with room for so many more tokens a row."""

    def grow(leaf: Array) -> Array:
        widths = [(0, 0)] * leaf.ndim
        widths[-3] = (0, slots)
        return jnp.pad(leaf, widths)

    return Cache(jax.tree.map(grow, cache.keys), jax.tree.map(grow, cache.values), cache.lengths)
