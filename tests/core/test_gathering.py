"""Explicit FSDP on eight devices: the losses, gradients and updates of one; and what travels between them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from almost_jax.config import MeshConfig, OptimizerConfig
from almost_jax.core import layers, llama, losses
from almost_jax.core.attention import attention, causal_mask
from almost_jax.core.gathering import EXPLICIT_RULES, Gather, explicitly
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.partitioning import make_mesh, shardings
from almost_jax.core.splash import splash_attention
from almost_jax.core.train import Batch, accumulate_gradients, init_state, make_optimizer, make_train_step

CONFIG = LlamaConfig(
    vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=6,
    initializer_range=0.3, remat="full",
)  # fmt: skip


def loss_sums(params: Params, batch: Batch, *, config: LlamaConfig) -> losses.LossTerms:
    states = llama.hidden_states(params, config, batch["tokens"])
    return losses.cross_entropy_sums(llama.logits(params, config, states), batch["tokens"], batch["targets"])


def ragged_batch(rows: int) -> Batch:
    rng = np.random.default_rng(3)
    targets = np.arange(9)[None, :] < rng.integers(2, 9, rows)[:, None]
    return {"tokens": jnp.asarray(rng.integers(0, 24, (rows, 9)), jnp.int32), "targets": jnp.asarray(targets)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_of_explicit_fsdp_are_those_of_one_device(tied: bool, micro_batches: int) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params, batch = llama.init_params(config, jax.random.key(1)), ragged_batch(16)
    expected, figures = accumulate_gradients(functools.partial(loss_sums, config=config), params, batch, 1)

    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    parted = dataclasses.replace(config, gather=Gather(4, 2))
    placement = shardings(llama.logical_axes(config), mesh, EXPLICIT_RULES)
    specs = jax.tree.map(lambda sharding: sharding.spec, placement)
    spread = functools.partial(explicitly, mesh=mesh, param_specs=specs)
    placed = jax.device_put(params, placement)
    rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    found, own = jax.jit(
        lambda params, batch: accumulate_gradients(
            functools.partial(loss_sums, config=parted), params, batch, micro_batches, spread
        )
    )(placed, rows)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        other = functools.reduce(lambda tree, entry: tree[entry.key], path, found)
        np.testing.assert_allclose(other, leaf, atol=2e-6, err_msg=str(path))
    assert float(own["loss"]) == pytest.approx(float(figures["loss"]), rel=1e-6)
    assert own.keys() == figures.keys()


def test_explicit_step_reduce_scatters_one_axis_at_a_time_and_keeps_the_shardings() -> None:
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    placement = shardings(llama.logical_axes(CONFIG), mesh, EXPLICIT_RULES)
    specs = jax.tree.map(lambda sharding: sharding.spec, placement)
    parted = dataclasses.replace(CONFIG, gather=Gather(4, 2))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 5)
    params = jax.device_put(llama.init_params(CONFIG, jax.random.key(1)), placement)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda x: jax.device_put(x, whole) if x.ndim == 0 else x, init_state(params, optimizer))
    spread = functools.partial(explicitly, mesh=mesh, param_specs=specs)
    make = functools.partial(
        make_train_step,
        functools.partial(loss_sums, config=parted), optimizer, 1, jax.tree.map(lambda x: x.sharding, state), spread,
    )  # fmt: skip
    step = make()
    rows = jax.device_put(ragged_batch(16), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    text = step.lower(state, rows).as_text()
    assert text.count("stablehlo.reduce_scatter") >= 2
    # A call of two steps is the same two.
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), rows)
    _, expected = make(several=True)(jax.tree.map(jnp.copy, state), twice)
    after, figures = step(state, rows)
    assert np.isfinite(float(figures["loss"]))
    assert float(figures["loss"]) == pytest.approx(float(expected["loss"][0]), rel=1e-6)
    after, figures = step(after, rows)
    assert float(figures["loss"]) == pytest.approx(float(expected["loss"][1]), rel=1e-5)
    assert after.params["layers"]["mlp"]["gate"]["kernel"].sharding.spec == PartitionSpec(None, ("fsdp", "data"), None)


def test_dimensions_that_the_mesh_cannot_split_are_named() -> None:
    with pytest.raises(ValueError, match="'embed' of size 16 can't be split over fsdp x data = 32 devices"):
        Gather(8, 4).local_shape((16, 4, 6), ("embed", "kv_heads", "head_dim"))
    with pytest.raises(ValueError, match=r"mesh\.tensor is 2"):
        explicitly(lambda params, batch: (params, batch), make_mesh(MeshConfig(tensor=2)), {})


@pytest.mark.parametrize("length", [128, 100, 131])
def test_splash_attention_equals_plain_attention(length: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 128)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.arange(length)[None, :] >= np.array([[40], [90]]), jnp.int32)
    mask = causal_mask(jnp.broadcast_to(jnp.arange(length)[None, :], (2, length)), segments)
    expected = attention(q, jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2), mask)
    np.testing.assert_allclose(splash_attention(q, k, v, segments, interpret=True), expected, atol=2e-5)


def test_a_model_with_splash_attention_takes_rows_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "splash_attention", functools.partial(splash_attention, interpret=True))
    config = dataclasses.replace(CONFIG, num_layers=2, remat="none")
    splash = dataclasses.replace(config, attention="splash")
    params, batch = llama.init_params(config, jax.random.key(1)), ragged_batch(2)
    plain, kernel = (
        jax.value_and_grad(functools.partial(loss_sums, config=one), has_aux=True)(params, batch)
        for one in (config, splash)
    )
    assert float(kernel[0][0]) == pytest.approx(float(plain[0][0]), rel=1e-5)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-5), kernel[1], plain[1])
    # Packed rows, and a prefix, whose keys are those of its own tokens alone.
    places = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 2), jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2] * 2)
    states = [
        llama.hidden_states(params, one, batch["tokens"], positions=places[0], segment_ids=places[1])
        for one in (config, splash)
    ]
    np.testing.assert_allclose(states[1], states[0], atol=2e-5)
    prefixes = [llama.prefill_prefix(params, one, batch["tokens"][0]) for one in (config, splash)]
    assert prefixes[1].length == 9
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-5), prefixes[1], prefixes[0])
