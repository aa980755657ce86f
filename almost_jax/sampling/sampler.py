"""The programs of the engine, arrays in and arrays out: prefill prompts, admit them to slots, decode all slots.

Slots are rows of fixed shape. A slot holds one request at a time; when that has ended, another one takes its place
while the others run on. Prefill and decoding are programs of their own, so that a compiler can lay out the cache for
the one that is run most.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from almost_jax.core.llama import (
    Cache,
    LlamaConfig,
    Params,
    Prefix,
    Prompts,
    empty_cache,
    hidden_states_cached,
    logits,
)
from almost_jax.core.partitioning import constrain, platform
from almost_jax.sampling.rules import SamplingRules, draw


@struct.dataclass
class Slots:
    """B slots, each with the state of its request.

    cache: keys and values of what each row has seen. last: [B] int32, the token drawn last, which is not in the cache
    yet. keys: [B, 2] uint32, the data of each request's key. drawn: [B] int32, how many tokens a request has. limits:
    [B] int32, how many it may have. running: [B] bool, False in a slot that waits for a request.
    """

    cache: Cache
    last: Array
    keys: Array
    drawn: Array
    limits: Array
    running: Array


@struct.dataclass
class Drawn:
    """What k steps drew.

    tokens: [B, k] int32 and logprobs: [B, k] float32, of which a row owns the first as many as its `drawn` has grown
    by. drawn: [B] int32 and running: [B] bool, as in `Slots`.
    """

    tokens: Array
    logprobs: Array
    drawn: Array
    running: Array


def empty_slots(config: LlamaConfig, batch: int, size: int) -> Slots:
    """B slots with room for `size` tokens each, none of them running."""
    zeros = jnp.zeros((batch,), jnp.int32)
    return Slots(
        cache=empty_cache(config, batch, size),
        last=zeros,
        keys=jnp.zeros((batch, 2), jnp.uint32),
        drawn=zeros,
        limits=zeros,
        running=jnp.zeros((batch,), bool),
    )


def prefill(
    params: Params, config: LlamaConfig, tokens: Array, num_tokens: Array, kept: Cache | None, prefix: Prefix | None
) -> tuple[Array, Cache]:
    """Read prompts, or what is new in them.

    Args:
        params: the model's tree.
        config: the model's shape.
        tokens: [R, T] int32, padded on the right.
        num_tokens: [R] int32 in 1..T.
        kept: what each row has seen before, with room for T more; None when nothing.
        prefix: what all rows saw before that.

    Returns:
        Logits [R, V] float32 behind each row's last token, and the cache of the rows.
    """
    cache = empty_cache(config, *tokens.shape) if kept is None else kept
    hidden, cache = hidden_states_cached(params, config, tokens, cache, num_tokens, prefix=prefix)
    last = jnp.take_along_axis(hidden, (num_tokens - 1)[:, None, None], axis=1)
    return constrain(logits(params, config, last)[:, 0], "batch", None), cache


def admit(
    slots: Slots,
    read: tuple[Array, Cache],
    rows: Array,
    places: Array,
    keys: Array,
    limits: Array,
    rules: SamplingRules,
    copies: bool = True,
) -> tuple[Slots, Array, Array]:
    """Put prefilled prompts into slots and draw each request's first token; many may fork from one prompt.

    Args:
        slots: are donated.
        read: what `prefill` returned.
        rows: [A] int32, which row of it each request has.
        places: [A] int32, the slot of each; B where there is no request, which goes nowhere.
        keys: [A, 2] uint32, data of the requests' keys.
        limits: [A] int32, at least 1.
        rules: how to draw, and the stop tokens.
        copies: whether every slot gets the prompt's cache; else its own begins behind the prompt, which is elsewhere.

    Returns:
        The slots, the first tokens [A] int32 and their log-probs [A] float32.
    """
    scores, cache = read
    tokens, logprobs = draw(scores[rows], _step_keys(keys, jnp.zeros(rows.shape, jnp.int32)), rules)
    running = ~_ends(tokens, rules) & (limits > 1)

    copy = functools.partial(_copied, rows=rows, places=places)

    def put(own: Array, new: Array) -> Array:
        return own.at[places].set(new, mode="drop")

    own = slots.cache
    if copies:
        filled = Cache(
            jax.tree.map(copy, own.keys, cache.keys),
            jax.tree.map(copy, own.values, cache.values),
            put(own.lengths, cache.lengths[rows]),
        )
    else:
        filled = Cache(own.keys, own.values, put(own.lengths, jnp.zeros(rows.shape, jnp.int32)))
    state = Slots(
        cache=filled,
        last=put(slots.last, tokens),
        keys=put(slots.keys, keys),
        drawn=put(slots.drawn, jnp.ones(rows.shape, jnp.int32)),
        limits=put(slots.limits, limits),
        running=put(slots.running, running),
    )
    return state, tokens, logprobs


def decode(
    params: Params,
    config: LlamaConfig,
    slots: Slots,
    prefix: Prefix | None,
    prompts: Prompts | None,
    steps: int,
    rules: SamplingRules,
) -> tuple[Slots, Drawn]:
    """Up to `steps` tokens for every running slot; fewer when all of them end before.

    Token g of a request is drawn with fold_in(its key, g), so that neither its slot nor its neighbours matter.

    Args:
        params: the model's tree.
        config: the model's shape.
        slots: are donated; every running one has room in the cache for what it may still draw.
        prefix: what all rows saw before their prompts; read in place, never copied per row.
        prompts: what several rows go on from, whose caches hold only what they drew since; read in place too.
        steps: k.
        rules: how to draw, and the stop tokens.
    """
    batch = slots.last.shape[0]
    columns = (
        constrain(jnp.zeros((batch, steps), jnp.int32), "batch", None),
        constrain(jnp.zeros((batch, steps), jnp.float32), "batch", None),
    )

    def unfinished(carry: Any) -> Array:
        step, slots, _ = carry
        return (step < steps) & slots.running.any()

    def advance(carry: Any) -> Any:
        step, slots, (all_tokens, all_logprobs) = carry
        running = slots.running
        one = running.astype(jnp.int32)
        hidden, cache = hidden_states_cached(
            params, config, slots.last[:, None], slots.cache, one, prefix=prefix, prompts=prompts
        )
        # Whole rows on every device: drawing then needs no communication and doesn't depend on the mesh.
        scores = constrain(logits(params, config, hidden)[:, 0], "batch", None)
        tokens, logprobs = draw(scores, _step_keys(slots.keys, slots.drawn), rules)
        drawn = slots.drawn + one
        state = Slots(
            cache=cache,
            last=jnp.where(running, tokens, slots.last),
            keys=slots.keys,
            drawn=drawn,
            limits=slots.limits,
            running=running & ~_ends(tokens, rules) & (drawn < slots.limits),
        )

        def write(columns: Array, column: Array) -> Array:
            column = jnp.where(running, column, jnp.zeros((), column.dtype))
            return jax.lax.dynamic_update_slice_in_dim(columns, column[:, None], step, axis=1)

        return step + 1, state, (write(all_tokens, tokens), write(all_logprobs, logprobs))

    _, slots, (tokens, logprobs) = jax.lax.while_loop(unfinished, advance, (jnp.zeros((), jnp.int32), slots, columns))
    return slots, Drawn(tokens, logprobs, slots.drawn, slots.running)


def request_keys(root: Array, words: Array) -> Array:
    """The data of requests' keys: the seed's [2] uint32 with two words of each id [A, 2] folded in -> [A, 2] uint32."""
    key = jax.random.wrap_key_data(root)
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(words)
    data: Array = jax.random.key_data(keys)
    return data


def halt(slots: Slots, places: Array) -> Slots:
    """Stop the slots at `places` [A] int32 (B is none): their requests met a stop string."""
    return dataclasses.replace(slots, running=slots.running.at[places].set(False, mode="drop"))


def grow(slots: Slots, size: int) -> Slots:
    """The slots with room for `size` tokens each, no fewer than before."""
    own = slots.cache

    def wider(leaf: Array, axis: int) -> Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, size - leaf.shape[axis])
        return jnp.pad(leaf, widths)

    keys = jax.tree.map(lambda leaf: wider(leaf, -1), own.keys)
    values = jax.tree.map(lambda leaf: wider(leaf, -2), own.values)
    cache = Cache(keys, values, own.lengths)
    return dataclasses.replace(slots, cache=cache)


def restore(cache: Cache, kept: Cache, rows: Array, places: Array, lengths: Array) -> Cache:
    """Copy rows of one cache to the beginning of another one's rows.

    Args:
        cache: [R, ...], is donated.
        kept: [A, ...].
        rows: [R'] int32, rows of `kept`.
        places: [R'] int32, where each goes; R is nowhere.
        lengths: [R'] int32, how many of each row's tokens count.
    """

    copy = functools.partial(_copied, rows=rows, places=places)
    return Cache(
        jax.tree.map(copy, cache.keys, kept.keys),
        jax.tree.map(copy, cache.values, kept.values),
        cache.lengths.at[places].set(lengths, mode="drop"),
    )


def _copied(own: Array, new: Array, rows: Array, places: Array) -> Array:
    """Keys or values [.., B, K, ...] with those of some rows of [.., R, K, ...] at its places; B or beyond is nowhere.

    The two may differ in room: what doesn't fit is padding. Scanned layers have L in front.
    """
    high, wide = (min(own.shape[axis], new.shape[axis]) for axis in (-2, -1))
    if own.ndim == 5:
        return own.at[:, places, :, :high, :wide].set(new[:, rows, :, :high, :wide], mode="drop")
    mesh = jax.sharding.get_abstract_mesh()
    if platform() != "cpu" or not (mesh.empty or mesh.size == 1):
        return own.at[places, :, :high, :wide].set(new[rows, :, :high, :wide], mode="drop")
    # A CPU gathers rows number by number and needs memory for all of them; one after the other they are copied.
    last = own.shape[0] - 1

    def copy(index: Array, own: Array) -> Array:
        start = (jnp.minimum(places[index], last), 0, 0, 0)
        row = jax.lax.dynamic_slice_in_dim(new[..., :high, :wide], rows[index], 1)
        row = jnp.where(places[index] > last, jax.lax.dynamic_slice(own, start, row.shape), row)
        return jax.lax.dynamic_update_slice(own, row, start)

    return jax.lax.fori_loop(0, rows.shape[0], copy, own)


def _ends(tokens: Array, rules: SamplingRules) -> Array:
    stops = jnp.asarray(rules.stop_tokens, jnp.int32)
    ended: Array = (tokens[:, None] == stops[None, :]).any(axis=1)
    return ended


def _step_keys(keys: Array, step: Array) -> Array:
    """The typed keys [A] of each request's token `step` [A], from the data [A, 2] of the requests' keys."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), step)
