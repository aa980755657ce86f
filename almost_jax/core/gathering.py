"""Explicit FSDP over two mesh axes: parameters gathered one axis at a time where they are used.

The batch is split over data and fsdp. Every matrix is split over both as well, along its model dimension, and each
layer gathers its own, first over one axis and then over the other. The gradient goes the same way back, as one
reduce-scatter an axis. Left to itself the compiler reduces such gradients by synchronous all-reduces of their whole
size (a group over two axes of a torus has no reduce-scatter), so this runs inside `jax.shard_map`, where collectives
are what the program says. The model dimension is the one to split: parts of the others (11008 / 8, say) don't fill the
chip's tiles, and the compiler makes padded all-reduces of such reduce-scatters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from almost_jax.core.partitioning import SLICE, Rules, partition_spec

# The axes that batches and parameters are split over.
AXES = ("data", "fsdp")

# Activations are local to a device, so their names have no mesh axis.
EXPLICIT_RULES: Rules = (
    ("layers", None),
    ("vocab", None),
    ("embed", ("fsdp", "data")),
    ("mlp", None),
    ("heads", None),
    ("kv_heads", None),
    ("head_dim", None),
    ("norm", None),
    ("batch", AXES),
)


@dataclasses.dataclass(frozen=True)
class Gather:
    """How parameters lie on a device inside `jax.shard_map`; hashable, a part of the model's config.

    data, fsdp: the mesh's sizes. reduce_dtype: of the gradients' sums over devices, "float32" or "bfloat16"; weights
    travel in the compute dtype either way.
    """

    data: int
    fsdp: int
    reduce_dtype: str = "float32"

    def local_shape(self, shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...]:
        """The shape of a device's part of a parameter.

        Raises:
            ValueError: a dimension can't be split evenly.
        """
        sizes = {"data": self.data, "fsdp": self.fsdp}
        local = []
        for size, name, entry in zip(shape, axes, partition_spec(axes, EXPLICIT_RULES), strict=True):
            over = _names(entry)
            parts = math.prod(sizes[axis] for axis in over)
            if size % parts:
                raise ValueError(f"{name!r} of size {size} can't be split over {' x '.join(over)} = {parts} devices")
            local.append(size // parts)
        return tuple(local)

    def whole(self, part: Array, axes: Sequence[str | None], dtype: Any) -> Array:
        """The whole parameter in `dtype` from a device's part; its gradient is summed over devices on the way back."""
        spec = partition_spec(axes, EXPLICIT_RULES)
        # What is split over two axes lies by the first one first, so it is put together from the last one on.
        steps = tuple((name, dim) for dim, entry in enumerate(spec) for name in reversed(_names(entry)))
        return _gathered(part, steps, np.dtype(dtype).name, self.reduce_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(part: Array, steps: tuple[tuple[str, int], ...], dtype: str, reduce_dtype: str) -> Array:
    found = part.astype(dtype)
    for name, dim in steps:
        found = jax.lax.all_gather(found, name, axis=dim, tiled=True)
    return found


def _gathered_forward(
    part: Array, steps: tuple[tuple[str, int], ...], dtype: str, reduce_dtype: str
) -> tuple[Array, Array]:
    # The residual only carries the dtype: an empty array.
    return _gathered(part, steps, dtype, reduce_dtype), jnp.zeros((0,), part.dtype)


def _gathered_backward(
    steps: tuple[tuple[str, int], ...], dtype: str, reduce_dtype: str, kept: Array, gradient: Array
) -> tuple[Array]:
    found = gradient.astype(reduce_dtype)
    for name, dim in reversed(steps):
        found = jax.lax.psum_scatter(found, name, scatter_dimension=dim, tiled=True)
    return (found.astype(kept.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def explicitly(
    totals: Callable[[Any, Any], tuple[Any, Any]], mesh: Mesh, param_specs: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Run (params, batch) -> (sums, gradients) on every device's own rows and add up.

    Args:
        totals: sums (any tree of scalars) and gradients (a tree like the parameters) of the rows that it is given.
        mesh: has the axes data and fsdp, and slice where there are several; a tensor axis must be 1.
        param_specs: the `PartitionSpec` of every parameter, by `EXPLICIT_RULES`.

    Returns:
        The same function of whole parameters and batches: sums over all rows, gradients that lie as the parameters do.

    Raises:
        ValueError: the mesh has a tensor axis larger than 1.
    """
    if mesh.shape.get("tensor", 1) != 1:
        raise ValueError(f"explicit FSDP splits over data and fsdp alone; mesh.tensor is {mesh.shape['tensor']}, not 1")

    # Slices have whole copies of the parameters: between them only a device's part of a gradient travels.
    axes = (SLICE, *AXES) if SLICE in mesh.axis_names else AXES

    def local(params: Any, batch: Any) -> tuple[Any, Any]:
        sums, grads = totals(params, batch)
        return jax.lax.psum(sums, axes), jax.tree.map(
            functools.partial(_summed_over_unused, axes=axes), grads, param_specs
        )

    mapped: Callable[[Any, Any], tuple[Any, Any]] = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(param_specs, PartitionSpec(axes)),
        out_specs=(PartitionSpec(), param_specs),
        check_vma=False,
    )
    return mapped


def _summed_over_unused(gradient: Array, spec: PartitionSpec, axes: tuple[str, ...]) -> Array:
    """Add up over the axes that a parameter isn't split over: what `whole` did not reduce already."""
    used = {name for entry in spec for name in _names(entry)}
    unused = tuple(name for name in axes if name not in used)
    return jax.lax.psum(gradient, unused) if unused else gradient


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
