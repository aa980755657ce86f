"""A tiny model with odd values everywhere, whose distributions are neither flat nor certain."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core.llama import LlamaConfig, Params, hidden_states, init_params, logits
from almost_jax.core.rotary import RopeConfig

MakeParams = Callable[[LlamaConfig, int], Params]
FullLogits = Callable[[Params, LlamaConfig, Sequence[int]], np.ndarray]


@pytest.fixture
def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=28,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-3,
        rope=RopeConfig(theta=1234.0),
        initializer_range=0.35,
    )


@pytest.fixture
def shardable(tiny: LlamaConfig) -> LlamaConfig:
    """Grouped-query attention in which every split dimension can be divided by 8."""
    return dataclasses.replace(
        tiny, vocab_size=40, hidden_size=24, intermediate_size=40, num_heads=16, num_kv_heads=8, head_dim=4
    )


@pytest.fixture
def make_params() -> MakeParams:
    def make(config: LlamaConfig, seed: int) -> Params:
        return init_params(config, jax.random.key(seed))

    return make


@functools.partial(jax.jit, static_argnames="config")
def _forward(params: Params, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    return logits(params, config, hidden_states(params, config, tokens))


@pytest.fixture
def full_logits() -> FullLogits:
    """Logits [T, V] of one row by the full forward pass, uncached; of one shape, so that it's compiled once."""

    def full(params: Params, config: LlamaConfig, row: Sequence[int]) -> np.ndarray:
        tokens = np.zeros((1, 48), np.int32)
        tokens[0, : len(row)] = row
        return np.asarray(_forward(params, config, jnp.asarray(tokens)))[0, : len(row)]

    return full
