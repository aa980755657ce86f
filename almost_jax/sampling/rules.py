"""How the next token is drawn: temperature, then top-k, then top-p, and one key per row."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from almost_jax.config import COLDEST

# The bits of a float32 in [0, 1], read as an integer, lie below 2 ** 30.
_UNIT_BITS = 30
# Tokens that are drawn from together, see `_pick`.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class SamplingRules:
    """How completions are drawn; hashable, so that it can be a static argument.

    `temperature: 0` is greedy, `top_p: 1` and `top_k: 0` are off. Any of `stop_tokens` ends a completion.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy), or {COLDEST:g} or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (off) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")

    @property
    def logprob_temperature(self) -> float:
        """The temperature of reported log-probs: the sampling temperature, or 1 when greedy."""
        return self.temperature if self.temperature > 0 else 1.0


def draw(logits: Array, keys: Array, rules: SamplingRules) -> tuple[Array, Array]:
    """Draw one token a row.

    Args:
        logits: [B, V] float32.
        keys: [B] typed keys.
        rules: temperature, top_k and top_p are read.

    Returns:
        Tokens [B] int32, and their log-probs [B] float32 under softmax(logits / temperature) over the whole
        vocabulary, whatever top-k and top-p cut away.
    """
    scaled = logits / rules.logprob_temperature
    peak = scaled.max(axis=1, keepdims=True)
    weights = jnp.exp(scaled - peak)
    if rules.temperature == 0:
        tokens = jnp.argmax(scaled, axis=1)
    elif rules.top_k == 0 and rules.top_p == 1:
        tokens = _pick(weights, keys)
    else:
        tokens = _pick(jnp.where(nucleus(scaled, rules), weights, 0.0), keys)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
    return tokens.astype(jnp.int32), chosen - peak[:, 0] - jnp.log(weights.sum(axis=1))


def nucleus(scaled: Array, rules: SamplingRules) -> Array:
    """Which tokens may be drawn: the top k, and of their distribution the smallest set whose probability reaches top_p.

    Of equal logits at the edge those of the lowest token ids are kept, as a stable sort would (Holtzman et al., 2020).

    Args:
        scaled: [B, V] float32, logits over temperature.
        rules: top_k and top_p are read.

    Returns:
        [B, V] bool, at least one True in every row.
    """
    keep = jnp.ones(scaled.shape, bool)
    if 0 < rules.top_k < scaled.shape[1]:
        edge = jax.lax.top_k(scaled, rules.top_k)[0][:, -1:]
        above, tied = scaled > edge, scaled == edge
        room = rules.top_k - above.sum(axis=1, keepdims=True)
        keep = above | (tied & (_rank(tied) < room))
    if rules.top_p < 1:
        keep = _top_p(jnp.where(keep, jnp.exp(scaled - scaled.max(axis=1, keepdims=True)), 0.0), rules.top_p)
    return keep


def _pick(weights: Array, keys: Array) -> Array:
    """Draw from each row's weights [B, V] by Gumbel noise on their logarithms: first a block of the vocabulary, by the
    sum of its weights, then a token within it.

    Another program may round a weight otherwise; that changes what is drawn only where the two best come within this
    rounding of each other. (To invert a running sum by one random number would move every token's edge with every
    weight before it.) In two steps a row takes V / 128 + 128 random numbers, not V. A weight of 0 is never drawn.
    """
    blocks = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % _BLOCK))).reshape(weights.shape[0], -1, _BLOCK)
    count = blocks.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (count + _BLOCK,), jnp.float32))(keys)
    block = jnp.argmax(jnp.log(blocks.sum(axis=2)) + noise[:, :count], axis=1)
    own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + jnp.argmax(jnp.log(own) + noise[:, count:], axis=1)


def _top_p(weights: Array, top_p: float) -> Array:
    """The smallest set that holds `top_p` of each row's weights [B, V] in [0, 1]; weights of 0 are never in it.

    Finds the smallest weight in the set by bisection over the bits of a float32, which are ordered as the floats are:
    30 sums over the vocabulary instead of a sort, and no tolerance.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    # A tiny share would be flushed to 0, which no weight at all reaches.
    target = jnp.maximum(top_p * weights.sum(axis=1), jnp.finfo(jnp.float32).tiny)

    def narrow(step: Array, edge: Array) -> Array:
        higher = edge | (1 << (_UNIT_BITS - 1 - step))
        mass = jnp.where(bits >= higher[:, None], weights, 0.0).sum(axis=1)
        return jnp.where(mass >= target, higher, edge)

    edge = jax.lax.fori_loop(0, _UNIT_BITS, narrow, jnp.zeros(target.shape, jnp.int32))
    # Rounding may keep the whole sum below a target close to it; an edge of 0 would let in what has no weight.
    edge = jnp.maximum(edge, 1)
    above, tied = bits > edge[:, None], bits == edge[:, None]
    missing = target - jnp.where(above, weights, 0.0).sum(axis=1)
    held_before = _rank(tied).astype(jnp.float32) * jax.lax.bitcast_convert_type(edge, jnp.float32)[:, None]
    keep: Array = above | (tied & (held_before < missing[:, None]))
    return keep


def _rank(tied: Array) -> Array:
    """How many True stand before each place of its row: [B, V] bool -> [B, V] int32."""
    count = tied.astype(jnp.int32)
    before: Array = jnp.cumsum(count, axis=1) - count
    return before
