"""LLaMA as a pure description: tokens (and a cache, and a shared prefix) in, hidden states and logits out.

Letters, used in this whole package: B batch, T query time, S key time, P shared-prefix time, D model, F feed-forward,
N query heads, K key/value heads, H head size, V vocabulary, L layers, Q prompts that rows share, M rows that share one.

The parameters are one nested dict. Policy, reference, reward model and critic are the same tree; the last two carry a
scalar head beside it (`almost_jax.core.heads`).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from almost_jax.core.attention import Seating, cache_mask, causal_mask
from almost_jax.core.layers import Kernel, RMSNorm, apply_layer, block_class
from almost_jax.core.layers import LlamaConfig as LlamaConfig
from almost_jax.core.layers import Params as Params
from almost_jax.core.partitioning import constrain, platform
from almost_jax.core.products import tied_logits
from almost_jax.core.rotary import rotary_table

_TABLE_AXES = ("vocab", "embed")


@struct.dataclass
class Cache:
    """Keys and values of what each row has seen, without the shared prefix.

    keys: [L, B, K, H, S] and values: [L, B, K, S, H] when layers are scanned, else tuples of L arrays. lengths: [B]
    int32, the slots filled; what lies beyond is garbage that no query may see and that the next tokens overwrite.
    """

    keys: Any
    values: Any
    lengths: Array


@struct.dataclass
class Prefix:
    """Keys [L, K, H, P] and values [L, K, P, H] of a prompt that all rows share, or tuples of L arrays."""

    keys: Any
    values: Any

    @property
    def length(self) -> int:
        """P, the number of shared tokens."""
        return int(jax.tree.leaves(self.keys)[0].shape[-1])


@struct.dataclass
class Prompts:
    """Q prompts, each of which several rows go on from.

    cache: of the prompts, a row each. members: [Q, M] int32 and seats: [B] int32 as in `attention.Seating`.
    """

    cache: Cache
    members: Array
    seats: Array

    def begins(self) -> Array:
        """How many tokens of a prompt stand before each row's own, [B] int32."""
        found: Array = jnp.take(
            jnp.repeat(self.cache.lengths, self.members.shape[1]), self.seats, mode="fill", fill_value=0
        )
        return found


def _of_layer(stacked: Any, index: int) -> Any:
    """Keys and values of one layer."""
    return None if stacked is None else (stacked[0][index], stacked[1][index])


class Llama(nn.Module):
    """The whole model; call `hidden_states` and `logits` below instead of `apply`."""

    config: LlamaConfig

    def setup(self) -> None:
        """Name the parameters."""
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        table = (c.vocab_size, c.hidden_size)
        self.embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(normal, _TABLE_AXES),
            table if c.gather is None else c.gather.local_shape(table, _TABLE_AXES),
        )
        block = block_class(c)
        if c.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            self.layers = scanned(c)
        else:
            self.layers = tuple(block(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_embeddings:
            kernel = functools.partial(Kernel, gather=c.gather, out_in=c.out_in, wide=True)
            self.lm_head = kernel(table[::-1], _TABLE_AXES[::-1], c.initializer_range)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        mask: Any,
        starts: Array | None = None,
        seating: Seating | None = None,
        own: Any = None,
        shared: Any = (None, None),
    ) -> tuple[Array, Any]:
        """Tokens [B, T] -> hidden states [B, T, D] after the last norm, and every layer's keys and values.

        `own` are keys and values of a cache, `shared` those of a prefix and of prompts, None where there are none.
        """
        c = self.config
        x = jnp.take(self.table(), tokens, axis=0).astype(c.dtype)
        if c.scan_layers:
            x, kept = self.layers(x, positions, mask, starts, seating, own, shared)
        else:
            keys, values = [], []
            for index, layer in enumerate(self.layers):
                memory = (_of_layer(own, index), tuple(_of_layer(one, index) for one in shared))
                if self.is_initializing():
                    x, (key, value) = layer(x, positions, mask, starts, seating, *memory)
                else:
                    # All layers are one function of their parameters, which is traced once.
                    x, (key, value) = apply_layer(
                        c, platform(), layer.variables["params"], x, positions, mask, starts, seating, *memory
                    )
                keys.append(key)
                values.append(value)
            kept = tuple(keys), tuple(values)
        return self.norm(x), kept

    def table(self) -> Array:
        """The whole embedding [V, D]."""
        c = self.config
        whole: Array = self.embedding
        return whole if c.gather is None else c.gather.whole(whole, _TABLE_AXES, c.dtype)

    def unembed(self, hidden: Array) -> Array:
        """Hidden states [B, T, D] -> logits [B, T, V] in float32."""
        if self.config.tie_embeddings:
            if platform() == "cpu":
                return constrain(tied_logits(hidden, self.table()), "batch", "length", "activation_vocab")
            table = self.table().astype(hidden.dtype)
            out = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        else:
            out = self.lm_head(hidden)
        return constrain(out, "batch", "length", "activation_vocab")

    def everything(self, tokens: Array, positions: Array, mask: Array) -> Array:
        """Both methods once, so that `init` makes every parameter."""
        return self.unembed(self(tokens, positions, mask)[0])


def _boxed(config: LlamaConfig, key: Array) -> Params:
    tokens = jnp.zeros((1, 2), jnp.int32)
    mask = jnp.ones((1, 2, 2), bool)
    # No parameter depends on the attention, and the kernel reads its mask otherwise.
    plain = dataclasses.replace(config, attention="plain")
    params: Params = dict(Llama(plain).init(key, tokens, tokens, mask, method="everything")["params"])
    return params


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: LlamaConfig, key: Array) -> Params:
    """Fresh float32 parameters: normal(initializer_range) matrices, ones for norms."""
    params: Params = nn.meta.unbox(_boxed(config, key))
    return params


def cast_matrices(params: Params, dtype: str) -> Params:
    """The same tree with its matrices stored in a dtype.

    Norms and a scalar head, which compute in float32, stay as they are, so that storing matrices in the compute dtype
    changes no bit of what is computed.
    """

    def cast(path: Any, leaf: Array) -> Array:
        *above, last = (entry.key for entry in path)
        return leaf.astype(dtype) if last in ("kernel", "embedding") and above != ["score"] else leaf

    cast_params: Params = jax.tree_util.tree_map_with_path(cast, params)
    return cast_params


def abstract_params(config: LlamaConfig) -> Params:
    """The tree of shapes and dtypes that `init_params` would make, without making it."""
    params: Params = nn.meta.unbox(_described(config))
    return params


def logical_axes(config: LlamaConfig) -> Params:
    """For every parameter the tuple of its logical axis names, in a tree like `init_params`'s."""
    boxed = _described(config)
    axes: Params = jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, jax.P))
    return axes


def _described(config: LlamaConfig) -> Params:
    """Every parameter's shape, dtype and axis names."""
    # What a program computes in, and how, changes no parameter.
    return _traced(dataclasses.replace(config, dtype="float32", remat="none", attention="plain", vocab_chunk=0))


@functools.lru_cache(maxsize=64)
def _traced(config: LlamaConfig) -> Params:
    # Flax knows parameters by running the model; a stage asks for them at every model that it loads.
    boxed: Params = jax.eval_shape(lambda: _boxed(config, jax.random.key(0)))
    return boxed


def hidden_states(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    *,
    prefix: Prefix | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    seen_ids: Array | None = None,
) -> Array:
    """The full forward pass of rows that stand alone (training, scoring).

    Rows are padded on the right; causality keeps padding from every real token, so no lengths are needed.

    Args:
        params: the model's tree; a scalar head in it is ignored.
        tokens: [B, T] int32.
        prefix: what all rows saw before their first token.
        positions: [B, T] absolute positions, below P + T; counted from the prefix's end when None.
        segment_ids: [B, T] for packed rows: tokens see their own segment only, and what `seen_ids` names.
        seen_ids: [B, T], with `segment_ids`: another segment that a token sees, as far as it stands before it.

    Returns:
        [B, T, D] after the last norm.

    Raises:
        ValueError: splash attention, whose kernel knows of segments alone, is given `seen_ids`, or these come without
            `segment_ids`.
    """
    if seen_ids is not None and segment_ids is None:
        raise ValueError("seen_ids name segments, so segment_ids must be given too")
    if config.attention == "splash" and seen_ids is not None:
        raise ValueError("splash attention can't let a token see another segment; give each text its own tokens")
    shared, offset = _shared(prefix)
    counted = positions is None
    if positions is None:
        positions = jnp.broadcast_to(offset + jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    if config.attention == "splash" and prefix is None:
        mask = jnp.zeros(tokens.shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    elif config.attention == "blocks" and prefix is None and segment_ids is None:
        mask = None
    else:
        mask = causal_mask(positions, segment_ids, seen_ids)
    where: Any = positions
    if platform() == "cpu":
        cos, sin = _table(config, offset + tokens.shape[1])
        where = (cos[None, offset:], sin[None, offset:]) if counted else (cos[positions], sin[positions])
    hidden, _ = Llama(config).apply({"params": params}, tokens, where, mask, shared=(shared, None))
    return hidden


def hidden_states_cached(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    cache: Cache,
    num_tokens: Array,
    *,
    prefix: Prefix | None = None,
    prompts: Prompts | None = None,
) -> tuple[Array, Cache]:
    """Continue every row of a cache by new tokens: prefill, a later turn, or one step of decoding.

    Args:
        params: the model's tree.
        tokens: [B, T] int32, padded on the right.
        cache: must have `cache.lengths + T <= S` in every row; the caller sees to it.
        num_tokens: [B] int32 in 0..T, how many of a row's tokens are real.
        prefix: what all rows saw before their first token.
        prompts: what some rows saw between that and what their cache holds.

    Returns:
        Hidden states [B, T, D] (garbage at padding) and the cache with `lengths + num_tokens`.
    """
    shared, offset = _shared(prefix)
    slots = jax.tree.leaves(cache.keys)[0].shape[-1]
    before, seating, known, room = cache.lengths, None, None, slots
    if prompts is not None:
        before = prompts.begins() + before
        read, most = prompts.cache, jax.tree.leaves(prompts.cache.keys)[0].shape[-1]
        known, room = (read.keys, read.values), most + slots
        seating = Seating(prompts.members, prompts.seats, jnp.arange(most)[None, :] < read.lengths[:, None])
    positions: Any = offset + before[:, None] + jnp.arange(tokens.shape[1])[None, :]
    if platform() == "cpu":
        # One place more than there is room for: a row that is full stands there.
        cos, sin = _table(config, offset + room + 1)
        positions = cos[positions], sin[positions]
    mask = cache_mask(cache.lengths, tokens.shape[1], slots)
    hidden, (keys, values) = Llama(config).apply(
        {"params": params},
        tokens,
        positions,
        mask,
        cache.lengths,
        seating,
        (cache.keys, cache.values),
        (shared, known),
    )
    return hidden, Cache(keys, values, cache.lengths + num_tokens)


def logits(params: Params, config: LlamaConfig, hidden: Array) -> Array:
    """Hidden states [B, T, D] -> logits [B, T, V], float32."""
    out: Any = Llama(config).apply({"params": params}, hidden, method="unembed")
    return jnp.asarray(out)


def empty_cache(config: LlamaConfig, batch: int, slots: int) -> Cache:
    """A cache of `batch` rows with room for `slots` tokens each beyond the prefix, in the compute dtype.

    On a CPU always in float32: it updates floats of two bytes by converting the whole cache to four and back, which
    costs more than products of float32 do.
    """
    heads, size = config.num_kv_heads, config.head_dim
    dtype = "float32" if platform() == "cpu" else config.dtype

    def zeros(shape: tuple[int, ...]) -> Any:
        axes = ("rows", "activation_kv_heads", None, None)
        if config.scan_layers:
            return constrain(jnp.zeros((config.num_layers, *shape), dtype), "layers", *axes)
        return tuple(constrain(jnp.zeros(shape, dtype), *axes) for _ in range(config.num_layers))

    return Cache(
        zeros((batch, heads, size, slots)), zeros((batch, heads, slots, size)), jnp.zeros((batch,), jnp.int32)
    )


def prefill_prefix(params: Params, config: LlamaConfig, tokens: Array) -> Prefix:
    """Compute a shared prefix once.

    Args:
        tokens: [P] int32, P >= 1.
    """
    if config.attention == "plain":
        config = dataclasses.replace(config, attention="blocks")
    row = tokens[None, :]
    positions: Any = jnp.arange(tokens.shape[0])[None, :]
    if platform() == "cpu":
        positions = tuple(part[None] for part in _table(config, tokens.shape[0]))
    mask = jnp.zeros(row.shape, jnp.int32) if config.attention == "splash" else None
    out: Any = Llama(config).apply({"params": params}, row, positions, mask)
    keys, values = out[1]
    if config.scan_layers:
        return Prefix(keys[:, 0], values[:, 0])
    return Prefix(tuple(key[0] for key in keys), tuple(value[0] for value in values))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack_layers(params: Params, num_layers: int) -> Params:
    """From the scanned tree ("layers", leaves [L, ...]) to the unrolled one ("layers_0", "layers_1", ...)."""
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    rows = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(num_layers)}  # noqa: B023
    return {**rest, **rows}


def _unstack_forward(params: Params, num_layers: int) -> tuple[Params, None]:
    return unstack_layers(params, num_layers), None


def _unstack_backward(num_layers: int, _: None, gradients: Params) -> tuple[Params]:
    # Written out, since the gradient of a slice is a whole array of zeros around it: L of them added up, L times over.
    layers = [gradients[f"layers_{i}"] for i in range(num_layers)]
    rest = {name: tree for name, tree in gradients.items() if not name.startswith("layers_")}
    return ({**rest, "layers": jax.tree.map(lambda *rows: jnp.stack(rows), *layers)},)


unstack_layers.defvjp(_unstack_forward, _unstack_backward)


def _table(config: LlamaConfig, length: int) -> tuple[Array, Array]:
    """Cosines and sines [T, H / 2] of the first positions."""
    cos, sin = rotary_table(config.rope, config.head_dim, length)
    return jnp.asarray(cos), jnp.asarray(sin)


def _shared(prefix: Prefix | None) -> tuple[Any, int]:
    return (None, 0) if prefix is None else ((prefix.keys, prefix.values), prefix.length)
