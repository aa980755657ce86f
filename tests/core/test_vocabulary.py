"""Scores of tokens a part of the vocabulary at a time: the values and gradients of one piece, without the piece."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.gathering import EXPLICIT_RULES, Gather, explicitly
from almost_jax.core.llama import LlamaConfig, Params, hidden_states, logical_axes
from almost_jax.core.losses import shifted, target_sums
from almost_jax.core.partitioning import batch_sharding, make_mesh, shardings
from almost_jax.core.vocabulary import hidden_figures

ROWS = np.random.default_rng(3).integers(0, 37, (4, 9)).astype(np.int32)


def weighted(params: Params, hidden: jax.Array, config: LlamaConfig, temperature: float) -> jax.Array:
    """A scalar in which every figure has weights of its own, so that every cotangent is looked at."""
    found = hidden_figures(params, config, hidden, jnp.asarray(ROWS), temperature, with_entropy=True)
    weights = np.random.default_rng(5).normal(size=(3, *ROWS.shape)).astype(np.float32)
    return sum(
        (jnp.sum(weight * value) for weight, value in zip(
            weights, (found.logprobs, found.logsumexp, found.entropy), strict=True
        )),
        jnp.float32(0.0),
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (5, 0.7), (36, 0.0)])
def test_parts_give_the_values_and_gradients_of_one_piece(
    tiny: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], tied: bool, chunk: int, temperature: float
) -> None:
    whole = dataclasses.replace(tiny, tie_embeddings=tied)
    parts = dataclasses.replace(whole, vocab_chunk=chunk)
    params = make_params(whole, 2)
    hidden = 3 * jax.random.normal(jax.random.key(4), (4, 9, tiny.hidden_size), jnp.float32)
    one, many = (
        jax.jit(hidden_figures, static_argnames=("config", "temperature", "with_entropy"))(
            params, config, hidden, jnp.asarray(ROWS), temperature, with_entropy=True
        )
        for config in (whole, parts)
    )
    np.testing.assert_array_equal(one.hits, many.hits)
    for name in ("logprobs", "logsumexp", "entropy"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), atol=1e-5)
        assert getattr(many, name).dtype == jnp.float32
    assert float(jnp.max(many.entropy)) > 0.5
    assert not hidden_figures(params, parts, hidden, jnp.asarray(ROWS), temperature, with_entropy=False).entropy.any()
    expected, found = (
        jax.jit(jax.grad(functools.partial(weighted, config=config, temperature=temperature), argnums=(0, 1)))(
            params, hidden
        )
        for config in (whole, parts)
    )
    for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5 * max(1.0, float(jnp.abs(left).max())))
    assert float(jnp.abs(found[1]).max()) > 0.1


def test_huge_logits_neither_overflow_nor_vanish(tiny: LlamaConfig) -> None:
    config = dataclasses.replace(tiny, vocab_chunk=7)
    kernel = jnp.zeros((20, 37), jnp.float32).at[0, 3].set(5e4).at[0, 30].set(-5e4)
    hidden = jnp.zeros((1, 2, 20), jnp.float32).at[:, :, 0].set(1.0)
    tokens = jnp.array([[3, 30]], jnp.int32)

    def figures(kernel: jax.Array) -> Any:
        return hidden_figures({"lm_head": {"kernel": kernel}}, config, hidden, tokens, 1.0, with_entropy=True)

    found = figures(kernel)
    np.testing.assert_allclose(found.logprobs, [[0, -1e5]], rtol=1e-6)
    np.testing.assert_allclose(found.entropy, 0, atol=1e-2)
    assert found.hits.tolist() == [[True, False]]
    assert bool(jnp.isfinite(jax.grad(lambda k: figures(k).logprobs.sum())(kernel)).all())


def test_compute_below_float32_keeps_figures_in_float32(
    tiny: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params]
) -> None:
    config = dataclasses.replace(tiny, dtype="bfloat16", vocab_chunk=9)
    params = make_params(config, 2)
    hidden = jax.random.normal(jax.random.key(4), (4, 9, 20), jnp.bfloat16)
    figures = jax.jit(hidden_figures, static_argnames=("config", "temperature", "with_entropy"))
    found = figures(params, config, hidden, jnp.asarray(ROWS), 1.0, with_entropy=True)
    exact = figures(params, tiny, hidden.astype(jnp.float32), jnp.asarray(ROWS), 1.0, with_entropy=True)
    assert found.logprobs.dtype == jnp.float32
    np.testing.assert_allclose(found.logprobs, exact.logprobs, atol=0.05)
    grads = jax.jit(jax.grad(functools.partial(weighted, config=config, temperature=1.0), argnums=(0, 1)))(
        params, hidden
    )
    assert grads[0]["lm_head"]["kernel"].dtype == jnp.float32 and grads[1].dtype == jnp.bfloat16


def loss_sums(params: Params, tokens: jax.Array, config: LlamaConfig) -> Any:
    states = hidden_states(params, config, tokens)
    figures = hidden_figures(params, config, states, shifted(tokens), 1.0, with_entropy=False)
    return target_sums(figures, jnp.ones(tokens.shape, bool).at[:, -1].set(False))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
def test_05_parts_are_the_same_on_eight_devices(
    shardable: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], tied: bool, explicit: bool
) -> None:
    config = dataclasses.replace(shardable, tie_embeddings=tied)
    params = make_params(config, 6)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, 48, (8, 5)), jnp.int32)
    grad = jax.value_and_grad(loss_sums, has_aux=True)
    (expected, _), gradients = jax.jit(functools.partial(grad, config=config))(params, tokens)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4) if explicit else MeshConfig(data=2, fsdp=2, tensor=2))
    # 48 in parts of 13: of 12 each, over a tensor axis of 2 from both of its halves.
    split = dataclasses.replace(config, vocab_chunk=13)
    placement: Any = shardings(logical_axes(config), mesh)
    with jax.set_mesh(mesh):
        if explicit:
            placement = shardings(logical_axes(config), mesh, EXPLICIT_RULES)
            split = dataclasses.replace(split, gather=Gather(2, 4))
            specs = jax.tree.map(lambda where: where.spec, placement)
            run = jax.jit(explicitly(lambda params, rows: grad(params, rows, split), mesh, specs))
        else:
            run = jax.jit(functools.partial(grad, config=split))
        (found, _), theirs = run(jax.device_put(params, placement), jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for left, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5, rtol=1e-4)
