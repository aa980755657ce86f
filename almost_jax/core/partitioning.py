"""Device meshes, and the one table that maps logical axis names to mesh axes.

Every parameter and activation of the model names its axes logically ("embed", "heads", "batch", ...). `RULES` says
which mesh axes each of them is split over; everything else (shardings of trees, constraints on activations) follows.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from almost_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")

MeshAxes: TypeAlias = str | tuple[str, ...] | None
Rules: TypeAlias = tuple[tuple[str, MeshAxes], ...]

# Parameters: matrices are split over fsdp on their model dimension and over tensor on the other one. Activations: rows
# over data and fsdp, heads and feed-forward over tensor.
RULES: Rules = (
    ("layers", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("norm", None),
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("activation_embed", None),
    ("activation_mlp", "tensor"),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_vocab", "tensor"),
)


_lowering_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("lowering_for", default=None)


def platform() -> str:
    """The platform that a program which is traced now will run on: "cpu", "gpu" or "tpu"."""
    return _lowering_for.get() or jax.default_backend()


@contextlib.contextmanager
def lowering_for(name: str) -> Iterator[None]:
    """Trace programs for another platform than this process has, to compile them ahead of time."""
    token = _lowering_for.set(name)
    try:
        yield
    finally:
        _lowering_for.reset(token)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as (data, fsdp, tensor).

    Args:
        config: devices per axis; at most one may be -1, which takes what the others leave.
        devices: the devices to use, all of them when None.

    Returns:
        A mesh whose axes are all `AxisType.Auto`: the compiler propagates shardings from the constraints given.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    found = list(jax.devices()) if devices is None else list(devices)
    sizes = mesh_sizes(config, len(found))
    grid = np.asarray(found).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """How many devices each mesh axis has, -1 filled in.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"{axis}: {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if -1 in sizes:
        others = int(np.prod([size for size in sizes if size != -1]))
        if devices % others:
            raise ValueError(f"mesh ({named}): {devices} devices can't be split by {others}")
        sizes[sizes.index(-1)] = devices // others
    if int(np.prod(sizes)) != devices:
        raise ValueError(f"mesh ({named}) needs {int(np.prod(sizes))} devices, but there are {devices}")
    return tuple(sizes)


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
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in used:
                raise ValueError(
                    f"logical axes {used[mesh_axis]!r} and {axis!r} of one array both want mesh axis {mesh_axis!r}"
                )
            used[mesh_axis] = axis
        spec.append(target)
    return PartitionSpec(*spec)


def shardings(logical_axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree of `NamedSharding` from a tree whose leaves are tuples of logical axis names."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes, rules)),
        logical_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
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
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first dimension over data and fsdp."""
    return NamedSharding(mesh, partition_spec(("batch",)))
