"""Device meshes, and the tables that map logical axis names to mesh axes.

Every parameter and activation of the model names its axes logically ("embed", "heads", "batch", ...). A preset's table
says which mesh axes each of them is split over; everything else (shardings of trees, constraints on activations)
follows. The axes of a mesh tell which preset it belongs to.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from almost_jax.config import MeshConfig, SamplingMeshConfig

# Axes that lie within one slice (ICI). Where there are several slices, joined by a slower network (DCN), the axis SLICE
# comes first: rows are split over it, parameters never.
MESH_AXES = ("data", "fsdp", "tensor")
SLICE = "slice"
# Of a mesh for sampling alone.
INFERENCE_AXES = ("data", "embed", "tensor")

MeshAxes: TypeAlias = str | tuple[str, ...] | None
Rules: TypeAlias = tuple[tuple[str, MeshAxes], ...]

_WEIGHTS: Rules = (
    ("layers", None),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("norm", None),
    ("length", None),
    ("activation_mlp", "tensor"),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_vocab", "tensor"),
)
# To train (presets fsdp and fsdp+tensor): matrices are split over fsdp on their model dimension and over tensor on the
# other one, rows over data and fsdp, heads and feed-forward over tensor.
RULES: Rules = (
    *_WEIGHTS,
    ("embed", "fsdp"),
    ("batch", ("data", "fsdp")),
    ("rows", ("data", "fsdp")),
    ("activation_embed", None),
)
# To sample (preset inference): weights stay where they are, split both ways, and the few activations of a step travel.
# The model dimension of activations is split as that of the weights is; attention, where each row has a cache of its
# own, takes its rows apart instead (Pope et al., Efficiently Scaling Transformer Inference, 2022, section 3.2.2).
INFERENCE_RULES: Rules = (
    *_WEIGHTS,
    ("embed", "embed"),
    ("batch", "data"),
    ("rows", ("data", "embed")),
    ("activation_embed", "embed"),
)


def rules_for(mesh: Mesh | AbstractMesh) -> Rules:
    """The table of the preset that a mesh belongs to, by its axes."""
    rules = INFERENCE_RULES if "embed" in mesh.axis_names else RULES
    if SLICE not in mesh.axis_names:
        return rules
    split = {"batch", "rows"}
    return tuple(
        (name, (SLICE, *_several(target)) if name in split else target) for name, target in rules
    )


_PRECISION = "jax_default_matmul_precision"
_lowering_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowering_for", default=None)


def platform() -> str:
    """The platform that a program which is traced now will run on: "cpu", "gpu" or "tpu"."""
    return _lowering_for.get() or jax.default_backend()


def training_options() -> dict[str, str]:
    """Compiler options of programs with gradients, for the platform that is traced for.

    A CPU's compiler puts work where most of it can run at once. What the backward pass computes from the forward one's
    arrays, transposed copies for instance, then comes early and stands in memory until it is needed: up to half as much
    again, all of it made anew at every step (LOG.md has figures).
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if platform() == "cpu" else {}


@contextlib.contextmanager
def exact_products(dtype: str) -> Iterator[None]:
    """Products of float32 are computed in float32 where `dtype` is "float32", in every thread.

    Accelerators round their operands to fewer bits unless they are told not to; a CPU does not.
    """
    if dtype != "float32" or platform() == "cpu":
        yield
        return
    before = getattr(jax.config, _PRECISION)
    jax.config.update(_PRECISION, "highest")
    try:
        yield
    finally:
        jax.config.update(_PRECISION, before)


@contextlib.contextmanager
def lowering_for(name: str) -> Iterator[None]:
    """Trace programs for another platform than this process has, to compile them ahead of time."""
    token = _lowering_for.set(name)
    try:
        yield
    finally:
        _lowering_for.reset(token)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as (data, fsdp, tensor), with the axis slice in front where there are several slices.

    Neighbours on the torus of a TPU become neighbours in the mesh, the last axes first.

    Args:
        config: devices of one slice per axis; at most one may be -1, which takes what the others leave.
        devices: the devices to use, all of them when None.

    Returns:
        A mesh whose axes are all `AxisType.Auto`: the compiler propagates shardings from the constraints given.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or can't be laid onto the chips.
    """
    found = list(jax.devices()) if devices is None else list(devices)
    sizes = mesh_sizes(config, len(found))
    if config.dcn_data == 1:
        return _mesh(_arranged(found, sizes), MESH_AXES)
    slices = config.dcn_data
    if len({getattr(device, "slice_index", 0) for device in found}) == slices:
        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes), (slices, 1, 1, 1), found)
    elif found[0].platform == "tpu":
        real = len({getattr(device, "slice_index", 0) for device in found})
        raise ValueError(f"mesh.dcn_data {slices}: the devices are of {real} slices; it must be their number")
    else:
        # Devices without slices, as in tests: some that follow each other play one.
        grid = np.asarray(found).reshape(slices, *sizes)
    return _mesh(grid, (SLICE, *MESH_AXES))


def make_sampling_mesh(config: SamplingMeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as (data, embed, tensor), to sample with the preset inference.

    Args:
        config: devices per axis; at most one may be -1.
        devices: the devices to use, all of them when None.

    Raises:
        ValueError: as `make_mesh`.
    """
    found = list(jax.devices()) if devices is None else list(devices)
    sizes = _filled(config.model_dump(include=set(INFERENCE_AXES)), INFERENCE_AXES, len(found), "mesh.sampling")
    return _mesh(_arranged(found, sizes), INFERENCE_AXES)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """How many devices of a slice each mesh axis has, -1 filled in.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    if devices % config.dcn_data:
        raise ValueError(f"mesh.dcn_data: {devices} devices can't be split over {config.dcn_data} slices")
    devices //= config.dcn_data
    given = config.model_dump(include=set(MESH_AXES))
    if config.data == config.fsdp == -1:
        both = devices // config.tensor
        given["data"] = max(size for size in range(1, math.isqrt(max(both, 1)) + 1) if both % size == 0)
    return _filled(given, MESH_AXES, devices, "mesh")


def _filled(given: dict[str, int], axes: Sequence[str], devices: int, key: str) -> tuple[int, ...]:
    sizes = [given[axis] for axis in axes]
    named = ", ".join(f"{axis}: {size}" for axis, size in zip(axes, sizes, strict=True))
    if -1 in sizes:
        others = math.prod(size for size in sizes if size != -1)
        if devices % others:
            raise ValueError(f"{key} ({named}): {devices} devices can't be split by {others}")
        sizes[sizes.index(-1)] = devices // others
    if math.prod(sizes) != devices:
        raise ValueError(f"{key} ({named}) needs {math.prod(sizes)} devices, but there are {devices}")
    return tuple(sizes)


def _arranged(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    try:
        grid: np.ndarray = mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError as error:
        # One axis of the mesh would be only a part of an axis of the torus: its collectives share links.
        try:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        except (NotImplementedError, ValueError):
            raise ValueError(f"{' x '.join(map(str, sizes))} can't be laid onto the chips ({error})") from error
    return grid


def _mesh(grid: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Translate logical axis names into mesh axes.

    Raises:
        ValueError: an axis is not in the rules, or two axes of one array want the same mesh axis.
    """
    table = dict(rules)
    spec: list[MeshAxes] = []
    used: dict[str, str] = {}
    for axis in axes:
        if axis is None:
            spec.append(None)
            continue
        if axis not in table:
            raise ValueError(f"logical axis {axis!r} has no rule; the rules know {sorted(table)}")
        target = table[axis]
        for mesh_axis in _several(target):
            if mesh_axis in used:
                raise ValueError(
                    f"logical axes {used[mesh_axis]!r} and {axis!r} of one array both want mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = axis
        spec.append(target)
    return PartitionSpec(*spec)


def shardings(logical_axes: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """A tree of `NamedSharding` from a tree whose leaves are tuples of logical axis names; the mesh's preset decides.

    `rules` replace the preset's.
    """
    table = rules_for(mesh) if rules is None else rules
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes, table)),
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the compiler how to split an activation; does nothing outside `jax.set_mesh` or inside `jax.shard_map`.

    Args:
        x: an activation with one logical name for each of its dimensions.
        axes: the names; None leaves a dimension whole.
    """
    if x.ndim != len(axes):
        raise ValueError(f"array of shape {x.shape} was given {len(axes)} logical axes {axes}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules_for(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def global_array(whole: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array over the devices of all processes, of which each puts its own part there.

    Args:
        whole: the same on every process.
        sharding: how it is split.
    """
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def to_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole on every process, also where devices of other processes hold a part.

    With several processes all must come here, with the same arrays.
    """

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first dimension over every axis that rows are split over."""
    return NamedSharding(mesh, partition_spec(("rows",), rules_for(mesh)))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split; B must be a multiple."""
    return math.prod(mesh.shape[axis] for axis in _several(dict(rules_for(mesh))["rows"]))


def whole_rows(mesh: Mesh, rows: int) -> int:
    """As many rows or more, so that `row_parts` divides them."""
    parts = row_parts(mesh)
    return -(-rows // parts) * parts


def _several(target: MeshAxes) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()
