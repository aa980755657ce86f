"""The scalar head that turns the policy's tree into a reward model or a critic."""

import jax
import jax.numpy as jnp
from jax import Array

from almost_jax.core.llama import LlamaConfig, Params, hidden_states

HEAD = "score"


def add_head(params: Params, config: LlamaConfig, key: Array, stddev: float = 0.0) -> Params:
    """The same tree with a scalar head [D] beside it: normal(stddev), or zeros.

    An existing head is replaced.
    """
    kernel = jax.random.normal(key, (config.hidden_size,), jnp.float32) * stddev
    return {**params, HEAD: {"kernel": kernel}}


def head_axes() -> Params:
    """Logical axes of the head, to stand beside `llama.logical_axes`."""
    return {HEAD: {"kernel": ("norm",)}}


def state_scores(params: Params, hidden: Array) -> Array:
    """The head's value of hidden states: [B, T, D] -> [B, T] float32."""
    kernel = params[HEAD]["kernel"].astype(jnp.float32)
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), kernel)


def token_scores(params: Params, config: LlamaConfig, tokens: Array) -> Array:
    """The head's value at every position: a critic's values.

    Args:
        params: a tree with a head.
        tokens: [B, T] int32, padded on the right.

    Returns:
        [B, T] float32.
    """
    return state_scores(params, hidden_states(params, config, tokens))


def sequence_scores(params: Params, config: LlamaConfig, tokens: Array, lengths: Array) -> Array:
    """The head's value at each row's last real token: a reward model's score, before normalisation.

    Args:
        params: a tree with a head.
        tokens: [B, T] int32, padded on the right.
        lengths: [B] int32 in 1..T. A row of length 0 has no last token; its score is defined as NaN so that it can't
            pass for a real one, and callers refuse it before they come here.

    Returns:
        [B] float32.
    """
    scores = token_scores(params, config, tokens)
    last = jnp.take_along_axis(scores, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(lengths > 0, last, jnp.nan)
