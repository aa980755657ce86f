"""Log-probs of tokens from hidden states, a part of the vocabulary at a time: B x T x V never stands in memory.

The head is applied to `LlamaConfig.vocab_chunk` entries at a time; a running maximum and running sums give the log of
the sum of exponentials, the entropy and the target's logit (online softmax, Milakov and Gimelshein 2018). The backward
pass makes each part of the logits again, and from it that part of the head's gradient. Going over the vocabulary and
not over tokens is what keeps the peak low where parameters are sharded: no gradient of the whole head is carried, and
with `core.gathering` no device ever holds the whole head.
"""

import dataclasses
import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from almost_jax.core.llama import LlamaConfig, Params, logits
from almost_jax.core.losses import TokenFigures, token_figures
from almost_jax.core.partitioning import constrain

# Four arrays [B, T]: what `hidden_figures` returns, or what is carried towards it.
_Four: TypeAlias = tuple[Array, Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How the vocabulary is cut: into `blocks` equal ones (one for each part of the tensor axis), and each of these
    into `number` parts of `size` entries, the last of which may overlap the one before it.
    """

    config: LlamaConfig
    temperature: float
    with_entropy: bool
    blocks: int
    number: int
    size: int

    @property
    def block(self) -> int:
        return self.config.vocab_size // self.blocks


def hidden_figures(
    params: Params, config: LlamaConfig, hidden: Array, tokens: Array, temperature: float, with_entropy: bool
) -> TokenFigures:
    """What the model says of given tokens, from the hidden states that predict them.

    With `config.vocab_chunk` 0, or not smaller than the vocabulary, the logits are made in one piece.

    Args:
        params: the model's tree, in the layout that `config` says.
        config: its shape.
        hidden: [B, T, D]; `hidden[:, t]` predicts `tokens[:, t]`.
        tokens: [B, T] int32.
        temperature: divides the logits; 0, which is greedy, scores at temperature 1.
        with_entropy: False leaves `entropy` 0 and saves its work.

    Returns:
        Figures [B, T], those that are numbers in float32.
    """
    if not 0 < config.vocab_chunk < config.vocab_size:
        return token_figures(logits(params, config, hidden), tokens, temperature, with_entropy)
    mesh = jax.sharding.get_abstract_mesh()
    blocks = 1 if mesh.empty or mesh.manual_axes else mesh.shape.get("tensor", 1)
    if config.vocab_size % blocks:
        blocks = 1
    number = -(-config.vocab_size // config.vocab_chunk)
    block = config.vocab_size // blocks
    parts = _Parts(
        config, temperature if temperature > 0 else 1.0, with_entropy, blocks, number, -(-block // number)
    )
    weight = params["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"]
    logprobs, logsumexp, entropy, hits = _figures(parts, weight, hidden, tokens)
    return TokenFigures(logprobs, logsumexp, entropy, hits)


def _axes(parts: _Parts) -> tuple[str | None, ...]:
    """Logical axes of the head cut into blocks: [blocks, V / blocks, D] when tied, else [D, blocks, V / blocks]."""
    return ("vocab", None, "embed") if parts.config.tie_embeddings else ("embed", "vocab", None)


def _in_blocks(parts: _Parts, weight: Array) -> Array:
    tied = parts.config.tie_embeddings
    shape = (parts.blocks, parts.block, weight.shape[1]) if tied else (weight.shape[0], parts.blocks, parts.block)
    return constrain(weight.reshape(shape), *_axes(parts))


def _place(parts: _Parts, index: Array) -> tuple[Array, Array, Array]:
    """Where part `index` starts in each block, its entries' ids [blocks, size], and which of them are new [size]."""
    wanted = index * parts.size
    start = jnp.minimum(wanted, parts.block - parts.size)
    inside = start + jnp.arange(parts.size, dtype=jnp.int32)
    ids = jnp.arange(parts.blocks, dtype=jnp.int32)[:, None] * parts.block + inside[None, :]
    return start, ids, inside >= wanted


def _whole(parts: _Parts, piece: Array, dtype: str) -> Array:
    """A part of the head in the compute dtype, gathered where a device holds a share of it."""
    gather = parts.config.gather
    if gather is None:
        return piece.astype(dtype)
    tied = parts.config.tie_embeddings
    flat = piece.reshape(piece.shape[1:] if tied else (piece.shape[0], piece.shape[2]))
    found = gather.whole(flat, ("vocab", "embed") if tied else ("embed", "vocab"), dtype)
    return found[None] if tied else found[:, None]


def _cut(parts: _Parts, blocks: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(blocks, start, parts.size, axis=1 if parts.config.tie_embeddings else 2)


def _logits(parts: _Parts, hidden: Array, piece: Array, fresh: Array) -> Array:
    """Tempered logits [B, T, blocks, size] of one part, float32; -inf where an entry was in the part before."""
    form = "btd,kvd->btkv" if parts.config.tie_embeddings else "btd,dkv->btkv"
    found = jnp.einsum(form, hidden, piece, preferred_element_type=jnp.float32)
    found = constrain(found, "batch", "length", "activation_vocab", None) / parts.temperature
    return jnp.where(fresh[None, None, None, :], found, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _figures(parts: _Parts, weight: Array, hidden: Array, tokens: Array) -> _Four:
    blocks, dtype = _in_blocks(parts, weight), hidden.dtype.name

    def step(carry: _Four, index: Array) -> tuple[_Four, None]:
        # others: the largest logit but the target's. total, weighted: sums of exp(x - top) and of x exp(x - top).
        others, chosen, total, weighted = carry
        start, ids, fresh = _place(parts, index)
        x = _logits(parts, hidden, _whole(parts, _cut(parts, blocks, start), dtype), fresh)
        target = (ids[None, None] == tokens[..., None, None]) & fresh[None, None, None, :]
        before = jnp.maximum(others, chosen)
        others = jnp.maximum(others, jnp.max(x, axis=(2, 3), initial=-jnp.inf, where=~target))
        chosen = jnp.maximum(chosen, jnp.max(x, axis=(2, 3), initial=-jnp.inf, where=target))
        top = jnp.maximum(others, chosen)
        shrink, power = jnp.exp(before - top), jnp.exp(x - top[..., None, None])
        total = total * shrink + jnp.sum(power, axis=(2, 3))
        if parts.with_entropy:
            weighted = weighted * shrink + jnp.sum(
                power * x, axis=(2, 3), where=jnp.broadcast_to(fresh[None, None, None, :], x.shape)
            )
        return (others, chosen, total, weighted), None

    empty = constrain(jnp.zeros(tokens.shape, jnp.float32), "batch", "length")
    indices = jnp.arange(parts.number, dtype=jnp.int32)
    start = (empty - jnp.inf, empty - jnp.inf, empty, empty)
    (others, chosen, total, weighted), _ = jax.lax.scan(step, start, indices)
    logsumexp = jnp.maximum(others, chosen) + jnp.log(total)
    entropy = logsumexp - weighted / total if parts.with_entropy else empty
    return chosen - logsumexp, logsumexp, entropy, chosen > others


def _forward(
    parts: _Parts, weight: Array, hidden: Array, tokens: Array
) -> tuple[_Four, tuple[Array, Array, Array, Array, Array]]:
    found = _figures(parts, weight, hidden, tokens)
    return found, (weight, hidden, tokens, found[1], found[2])


def _backward(
    parts: _Parts, kept: tuple[Array, Array, Array, Array, Array], gradients: _Four
) -> tuple[Array, Array, None]:
    weight, hidden, tokens, logsumexp, entropy = kept
    for_logprobs, for_logsumexp, for_entropy, _ = gradients
    blocks, dtype, tied = _in_blocks(parts, weight), hidden.dtype.name, parts.config.tie_embeddings

    def wide(x: Array) -> Array:
        return x[..., None, None]

    def step(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        to_hidden, to_weight = carry
        start, ids, fresh = _place(parts, index)
        piece, back = jax.vjp(lambda share: _whole(parts, share, dtype), _cut(parts, blocks, start))
        x = _logits(parts, hidden, piece, fresh)
        power = jnp.exp(x - wide(logsumexp))
        # d log p(y) = 1[v = y] - p; d logsumexp = p; d entropy = -p (log p + entropy), each over the temperature.
        slope = (wide(for_logsumexp) - wide(for_logprobs)) * power
        if parts.with_entropy:
            logp = jnp.where(fresh[None, None, None, :], x - wide(logsumexp), 0.0)
            slope = slope - wide(for_entropy) * power * (logp + wide(entropy))
        target = (ids[None, None] == wide(tokens)) & fresh[None, None, None, :]
        slope = (slope + jnp.where(target, wide(for_logprobs), 0.0)) / parts.temperature
        slope = slope.astype(dtype)
        to_hidden = to_hidden + jnp.einsum(
            "btkv,kvd->btd" if tied else "btkv,dkv->btd", slope, piece, preferred_element_type=jnp.float32
        )
        own = jnp.einsum("btkv,btd->kvd" if tied else "btkv,btd->dkv", slope, hidden)
        share = back(own)[0]
        axis = 1 if tied else 2
        # Entries that the part before had too get a zero from this one.
        summed = jax.lax.dynamic_slice_in_dim(to_weight, start, parts.size, axis) + share
        to_weight = constrain(
            jax.lax.dynamic_update_slice_in_dim(to_weight, summed, start, axis), *_axes(parts)
        )
        return (constrain(to_hidden, "batch", "length", None), to_weight), None

    nothing = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(blocks)
    (to_hidden, to_weight), _ = jax.lax.scan(step, nothing, jnp.arange(parts.number, dtype=jnp.int32))
    return to_weight.reshape(weight.shape), to_hidden.astype(hidden.dtype), None


_figures.defvjp(_forward, _backward)
