"""Meshes, the table of logical axes, and: one device equals eight."""

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from almost_jax.config import MeshConfig
from almost_jax.core import heads, llama, losses
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.partitioning import (
    batch_sharding,
    constrain,
    exact_products,
    lowering_for,
    make_mesh,
    partition_spec,
    replicated,
    shardings,
    whole_rows,
)
from almost_jax.core.train import Batch, init_state, make_train_step

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (4, 1, 2)]


def mesh_of(sizes: tuple[int, int, int]) -> Mesh:
    return make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))


@pytest.mark.parametrize(("sizes", "rows"), [((8, 1, 1), [8, 8, 16]), ((1, 1, 8), [1, 8, 9]), ((2, 2, 2), [4, 8, 12])])
def test_rows_are_as_many_for_every_device_that_splits_them(sizes: tuple[int, int, int], rows: list[int]) -> None:
    assert [whole_rows(mesh_of(sizes), count) for count in (1, 8, 9)] == rows


def test_float32_is_exact_on_accelerators_in_every_thread_and_untouched_elsewhere() -> None:
    def product(found: list[str]) -> None:
        square = jnp.ones((2, 2), jnp.float32)
        found.append(jax.jit(jnp.matmul).lower(square, square).as_text())

    def lowered(dtype: str) -> list[str]:
        found: list[str] = []
        with exact_products(dtype):
            product(found)
            thread = threading.Thread(target=product, args=(found,))
            thread.start()
            thread.join()
        return found

    plain = lowered("float32")
    assert "HIGHEST" not in plain[0] and plain[0] == plain[1]
    with lowering_for("tpu"):
        assert all("HIGHEST, HIGHEST" in text for text in lowered("float32"))
        assert lowered("bfloat16") == plain
    assert jax.config.jax_default_matmul_precision is None


def loss_sums(config: LlamaConfig) -> Callable[[Params, Batch], losses.LossTerms]:
    """A loss that reaches every parameter: next-token cross-entropy plus the scalar head's ranking loss."""

    def sums(params: Params, batch: Batch) -> losses.LossTerms:
        tokens, lengths = batch["tokens"], batch["lengths"]
        logits = llama.logits(params, config, llama.hidden_states(params, config, tokens))
        mask = losses.length_mask(lengths, tokens.shape[1])
        total, (count, metrics) = losses.cross_entropy_sums(logits, tokens, mask)
        scores = heads.sequence_scores(params, config, tokens, lengths)
        ranking = losses.pairwise_ranking_loss(scores, -scores, 0.0).sum()
        return total + ranking, (count, metrics)

    return sums


@pytest.fixture
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 48, (8, 9)).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray([9, 2, 5, 7, 3, 9, 4, 6], jnp.int32)}


@pytest.mark.parametrize("sizes, micro_batches", [*((sizes, 1) for sizes in MESHES), ((2, 2, 2), 2), ((1, 1, 8), 4)])
def test_05_one_device_equals_eight_for_loss_and_gradients(
    shardable: LlamaConfig,
    make_params: Callable[[LlamaConfig, int], Params],
    batch: Batch,
    sizes: tuple[int, int, int],
    micro_batches: int,
) -> None:
    config = shardable
    params = heads.add_head(make_params(config, 1), config, jax.random.key(2), stddev=0.3)
    optimizer = optax.sgd(1.0)  # the new parameters are the old ones minus the gradient
    step = make_train_step(loss_sums(config), optimizer, micro_batches)

    single, metrics = step(jax.tree.map(jnp.copy, init_state(params, optimizer)), batch)
    mesh = mesh_of(sizes)
    axes = {**llama.logical_axes(config), **heads.head_axes()}
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(axes, mesh))
        rows = jax.device_put(batch, batch_sharding(mesh))
        state, found = step(init_state(jax.tree.map(jnp.copy, split), optimizer), rows)

    kernel = split["layers"]["attention"]["key"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 24 // sizes[1], 8 // sizes[2], 4), "really split"
    assert set(metrics) == set(found) == {"loss", "accuracy", "grad_norm"}
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5)

    def compare(path: jax.tree_util.KeyPath, before: jax.Array, one: jax.Array, eight: jax.Array) -> None:
        gradient = np.asarray(before) - np.asarray(one)
        assert np.abs(gradient).max() > 1e-4, jax.tree_util.keystr(path)
        np.testing.assert_allclose(eight, one, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, params, single.params, state.params)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_05_one_device_equals_eight_for_cached_decoding(
    shardable: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], batch: Batch, sizes: tuple[int, int, int]
) -> None:
    config, params = shardable, make_params(shardable, 3)

    @jax.jit
    def decode(params: Params, batch: Batch) -> tuple[jax.Array, llama.Cache]:
        shared = llama.prefill_prefix(params, config, batch["tokens"][0, :5])
        cache = llama.empty_cache(config, 8, 11)
        _, cache = llama.hidden_states_cached(
            params, config, batch["tokens"], cache, batch["lengths"], prefix=shared
        )
        ones = jnp.ones((8,), jnp.int32)
        hidden, cache = llama.hidden_states_cached(
            params, config, batch["tokens"][:, -1:], cache, ones, prefix=shared
        )
        return llama.logits(params, config, hidden), cache

    expected, _ = decode(params, batch)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(llama.logical_axes(config), mesh))
        found, cache = decode(split, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    rows, heads_ = 8 // (sizes[0] * sizes[1]), 8 // sizes[2]
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (2, rows, heads_, 4, 11)


def test_make_mesh_fills_the_free_axis_and_states_its_axis_types() -> None:
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    part = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), jax.devices()[:3])
    assert dict(part.shape) == {"data": 1, "fsdp": 3, "tensor": 1}


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-1, -1, 1), "only one mesh axis may be -1"),
        ((0, 1, 8), "an axis has a positive number of devices, or -1"),
        ((-2, 1, 1), "an axis has a positive number of devices, or -1"),
        ((-1, 3, 1), "8 devices can't be split by 3"),
        ((2, 2, 1), r"data: 2, fsdp: 2, tensor: 1\) needs 4 devices, but there are 8"),
        ((4, 2, 2), "needs 16 devices, but there are 8"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_their_numbers(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_of(sizes)


def test_partition_spec_translates_names_into_mesh_axes() -> None:
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
    assert partition_spec(("batch", None, "activation_mlp")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert partition_spec(("embed",), (("embed", ("data", "tensor")),)) == PartitionSpec(("data", "tensor"))


@pytest.mark.parametrize(
    "axes, message",
    [
        (("mlp", "heads"), "'mlp' and 'heads' of one array both want mesh axis 'tensor'"),
        (("batch", "embed"), "'batch' and 'embed' of one array both want mesh axis 'fsdp'"),
        (("embed", None, "embed"), "both want mesh axis 'fsdp'"),
        (("embed", "hats"), "'hats' has no rule; the rules know"),
    ],
)
def test_collisions_and_unknown_axes_are_refused(axes: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_spec(axes)


def test_constrain_does_nothing_without_a_mesh_and_splits_within_one() -> None:
    x = jnp.ones((8, 3, 4), jnp.float32)
    assert constrain(x, "batch", "length", "activation_mlp") is x
    with pytest.raises(ValueError, match=r"shape \(8, 3, 4\) was given 2 logical axes"):
        constrain(x, "batch", "length")
    mesh = mesh_of((2, 2, 2))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: constrain(x, "batch", "length", "activation_mlp"))(x)
    assert split.sharding.shard_shape(x.shape) == (2, 3, 2)
    assert replicated(mesh).shard_shape(x.shape) == (8, 3, 4)
