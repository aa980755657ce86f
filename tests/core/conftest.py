"""A tiny model with odd values everywhere, so that no default passes by luck."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from almost_jax.core.llama import LlamaConfig, Params, init_params
from almost_jax.core.rotary import RopeConfig


@pytest.fixture
def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=28,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-3,
        rope=RopeConfig(theta=1234.0),
        initializer_range=0.25,
    )


@pytest.fixture
def shardable(tiny: LlamaConfig) -> LlamaConfig:
    """Grouped-query attention in which every split dimension can be divided by 8."""
    sizes = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_layers": 2}
    return dataclasses.replace(tiny, **sizes, num_heads=16, num_kv_heads=8, head_dim=4)


@pytest.fixture
def make_params() -> Callable[[LlamaConfig, int], Params]:
    """Random parameters whose norm scales aren't all ones."""

    def make(config: LlamaConfig, seed: int) -> Params:
        params = init_params(config, jax.random.key(seed))
        leaves, tree = jax.tree.flatten_with_path(params)
        keys = jax.random.split(jax.random.key(seed + 1000), len(leaves))
        moved = [
            leaf + 0.3 * jax.random.normal(key, leaf.shape, jnp.float32) if path[-1].key == "scale" else leaf
            for key, (path, leaf) in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, moved)

    return make
