"""One prompt continued token by token, for people who read along; the same tokens as the batch sampler draws.

In bfloat16 the two round at different places.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from almost_jax.core.llama import Cache, LlamaConfig, Params, empty_cache, hidden_states_cached, logits
from almost_jax.sampling.padding import bucket_length, pad_batch
from almost_jax.sampling.rules import SamplingRules, draw


def stream(
    params: Params, config: LlamaConfig, prompt: Sequence[int], rules: SamplingRules, key: Array, *, multiple: int
) -> Iterator[int]:
    """Continue a prompt; each token is given as soon as it is drawn, the stop token too, which is the last.

    Token g is drawn with fold_in(key, g), as the engine does for a request. The caller may leave off at any token.
    Under a mesh, iterate inside `jax.set_mesh`.

    Args:
        params: the model's tree, in the layout that `config.scan_layers` says (see `layout.decode_layout`).
        config: the model's shape.
        prompt: at least one token id.
        rules: how to draw and when to stop.
        key: a typed key.
        multiple: the prompt and the cache are padded to a multiple of it, so that a few programs serve all lengths.

    Raises:
        ValueError: the prompt is empty, or leaves no room for max_new_tokens within the model's positions.
    """
    needed = len(prompt) + rules.max_new_tokens
    if not prompt or needed > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens {rules.max_new_tokens} need 1 to "
            f"{config.max_position_embeddings} positions in all, with at least one token in the prompt"
        )
    return _stream(params, config, prompt, rules, key, multiple)


def _stream(
    params: Params, config: LlamaConfig, prompt: Sequence[int], rules: SamplingRules, key: Array, multiple: int
) -> Iterator[int]:
    tokens, lengths = pad_batch([prompt], 1, multiple)
    slots = bucket_length(tokens.shape[1] + rules.max_new_tokens, multiple)
    last, cache = _prefill(params, config, tokens, lengths, slots)
    for step in range(rules.max_new_tokens):
        drawn = _draw(last, key, np.int32(step), rules)
        token = int(drawn[0])
        yield token
        if token in rules.stop_tokens or step + 1 == rules.max_new_tokens:
            return
        last, cache = _advance(params, config, drawn, cache)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def _prefill(params: Params, config: LlamaConfig, tokens: Array, lengths: Array, slots: int) -> tuple[Array, Cache]:
    """Logits [1, V] behind the prompt [1, T], and the cache."""
    cache = empty_cache(config, 1, slots)
    hidden, cache = hidden_states_cached(params, config, tokens, cache, lengths)
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return logits(params, config, hidden)[:, 0], cache


@functools.partial(jax.jit, static_argnames="rules")
def _draw(last: Array, key: Array, step: Array, rules: SamplingRules) -> Array:
    """The next token [1] from the logits [1, V] behind the last one."""
    return draw(last, jax.random.fold_in(key, step)[None], rules)[0]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _advance(params: Params, config: LlamaConfig, token: Array, cache: Cache) -> tuple[Array, Cache]:
    """Logits [1, V] behind one more token [1]."""
    hidden, cache = hidden_states_cached(params, config, token[:, None], cache, jnp.ones((1,), jnp.int32))
    return logits(params, config, hidden)[:, 0], cache
