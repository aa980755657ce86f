"""Presets of meshes: how their axes are filled, slices, and that one device equals eight on each of them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from pydantic import ValidationError

from almost_jax.config import MeshConfig, SamplingMeshConfig
from almost_jax.core import llama, losses
from almost_jax.core.gathering import EXPLICIT_RULES, Gather, explicitly
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.partitioning import (
    batch_sharding,
    global_array,
    make_mesh,
    make_sampling_mesh,
    mesh_sizes,
    partition_spec,
    row_parts,
    rules_for,
    shardings,
    to_host,
)
from almost_jax.core.train import Batch, accumulate_gradients


def sums(params: Params, batch: Batch, config: LlamaConfig) -> losses.LossTerms:
    logits = llama.logits(params, config, llama.hidden_states(params, config, batch["tokens"]))
    return losses.cross_entropy_sums(logits, batch["tokens"], batch["targets"])


def rows_of(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    targets = np.arange(7)[None, :] < rng.integers(2, 8, count)[:, None]
    return {"tokens": rng.integers(0, 48, (count, 7)).astype(np.int32), "targets": targets}


def test_presets_fill_the_axes_that_are_left_out() -> None:
    assert mesh_sizes(MeshConfig(preset="fsdp"), 8) == (1, 8, 1)
    assert mesh_sizes(MeshConfig(preset="fsdp+tensor"), 64) == (1, 16, 4)
    assert mesh_sizes(MeshConfig(preset="fsdp+tensor", tensor=2, data=2), 8) == (2, 2, 2)
    assert MeshConfig.model_validate(MeshConfig(preset="fsdp").model_dump()) == MeshConfig(preset="fsdp")
    with pytest.raises(ValidationError):
        MeshConfig.model_validate({"preset": "inference"})
    mesh = make_sampling_mesh(SamplingMeshConfig(embed=2))
    assert dict(mesh.shape) == {"data": 1, "embed": 2, "tensor": 4}
    with pytest.raises(ValueError, match=r"mesh\.sampling \(data: 1, embed: 3, tensor: -1\): 8 devices"):
        make_sampling_mesh(SamplingMeshConfig(embed=3))


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (make_mesh(MeshConfig(preset="fsdp")), (("data", "fsdp"), "fsdp", None)),
        (make_mesh(MeshConfig(preset="fsdp+tensor")), (("data", "fsdp"), "fsdp", None)),
        (make_sampling_mesh(SamplingMeshConfig(embed=2)), ("data", "embed", "embed")),
        (make_mesh(MeshConfig(dcn_data=2)), (("slice", "data", "fsdp"), "fsdp", None)),
    ],
    ids=["fsdp", "fsdp+tensor", "inference", "slices"],
)
def test_the_axes_of_a_mesh_tell_its_table(mesh: Mesh, expected: tuple[object, ...]) -> None:
    table = dict(rules_for(mesh))
    assert (table["batch"], table["embed"], table["activation_embed"]) == expected
    with pytest.raises(ValueError, match="both want mesh axis"):
        partition_spec(("heads", "mlp"), rules_for(mesh))


def test_slices_are_the_outermost_axis_and_each_has_whole_parameters() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, dcn_data=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [device.id for device in mesh.devices[0].flat] == [0, 1, 2, 3], "a slice's devices stay together"
    assert row_parts(mesh) == 8
    assert partition_spec(("embed", "mlp"), rules_for(mesh)) == PartitionSpec("fsdp", "tensor")
    with pytest.raises(ValueError, match=r"mesh\.dcn_data: 8 devices can't be split over 3 slices"):
        make_mesh(MeshConfig(dcn_data=3))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_05_gradients_over_slices_are_those_of_one_device(
    shardable: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], micro_batches: int
) -> None:
    params, rows = make_params(shardable, 1), rows_of(16)
    batch = {name: jnp.asarray(array) for name, array in rows.items()}
    expected, _ = accumulate_gradients(functools.partial(sums, config=shardable), params, batch, 1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, dcn_data=2))
    placed = {name: global_array(array, batch_sharding(mesh)) for name, array in rows.items()}
    parted = dataclasses.replace(shardable, gather=Gather(2, 2))
    placement = shardings(llama.logical_axes(shardable), mesh, EXPLICIT_RULES)
    spread = functools.partial(explicitly, mesh=mesh, param_specs=jax.tree.map(lambda one: one.spec, placement))
    found, _ = jax.jit(
        lambda params, batch: accumulate_gradients(
            functools.partial(sums, config=parted), params, batch, micro_batches, spread
        )
    )(jax.device_put(params, placement), placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), to_host(found), jax.device_get(expected))


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 2, 2), (1, 8, 1), (1, 1, 8)], ids=str)
def test_05_one_device_equals_eight_on_a_mesh_for_sampling(
    shardable: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], sizes: tuple[int, int, int]
) -> None:
    params, rows = make_params(shardable, 3), rows_of(8)
    lengths = np.array([7, 2, 5, 7, 3, 1, 4, 6], np.int32)

    def both(params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, llama.Cache]:
        cache = llama.empty_cache(shardable, 8, 10)
        hidden, cache = llama.hidden_states_cached(params, shardable, tokens, cache, lengths)
        ones = jnp.ones((8,), jnp.int32)
        after, cache = llama.hidden_states_cached(params, shardable, tokens[:, -1:], cache, ones)
        return llama.logits(params, shardable, hidden), llama.logits(params, shardable, after), cache

    expected = jax.jit(both)(params, rows["tokens"], lengths)
    mesh = make_sampling_mesh(SamplingMeshConfig(data=sizes[0], embed=sizes[1], tensor=sizes[2]))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(llama.logical_axes(shardable), mesh))
        compiled = jax.jit(both).lower(split, rows["tokens"], lengths).compile()
        found = compiled(split, rows["tokens"], lengths)
    gate = split["layers"]["mlp"]["gate"]["kernel"]
    assert gate.sharding.shard_shape(gate.shape) == (2, 24 // sizes[1], 40 // sizes[2])
    keys = found[2].keys
    assert keys.addressable_shards[0].data.size == keys.size // 8, "the cache is split over all devices"
    real = np.arange(7)[None, :] < lengths[:, None]
    np.testing.assert_allclose(to_host(found[0])[real], jax.device_get(expected[0])[real], atol=3e-5)
    np.testing.assert_allclose(to_host(found[1]), jax.device_get(expected[1]), atol=3e-5)
    # Weights stay where they are: nothing as large as a layer's matrix is gathered.
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line and "f32[24,40]" in line]
    assert gathered == []


def test_05_the_full_pass_on_a_mesh_for_sampling_gives_the_same_loss(
    shardable: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params]
) -> None:
    """Scoring on that mesh goes through the same full pass as training."""
    params, rows = make_params(shardable, 5), rows_of(8)
    mesh = make_sampling_mesh(SamplingMeshConfig(embed=2, tensor=4))
    loss = jax.jit(lambda params, batch: sums(params, batch, shardable)[0])
    expected = loss(params, rows)
    with jax.set_mesh(mesh):
        found = loss(jax.device_put(params, shardings(llama.logical_axes(shardable), mesh)), rows)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_to_host_gives_whole_arrays_and_passes_over_what_is_no_array() -> None:
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = global_array(whole, batch_sharding(mesh))
    assert placed.addressable_shards[0].data.shape == (1, 3)
    found = to_host({"a": placed, "b": (2.5, None)})
    assert isinstance(found["a"], np.ndarray) and (found["a"] == whole).all() and found["b"] == (2.5, None)
