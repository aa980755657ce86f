"""Weights from a file's tensors to our tree, tensor by tensor, each straight to where it belongs.

Their linear layers hold [out, in]; ours hold the axes that the model contracts, so a matrix is transposed and its head
axes are split. Nothing else changes. Every device's part of a parameter is read on its own, and parameters come one
after the other, in blocks of rows: beyond the parameters themselves, reading needs the memory of one block.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from almost_jax.core.heads import HEAD
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
# A tensor is read in blocks of rows of about so many bytes, so that the largest one needs no second copy.
BLOCK_BYTES = 128 * 2**20
# The CPU backend takes over NumPy buffers that begin at a multiple of it, without a copy.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of our tree and its tensors in transformers' names.

    Attributes:
        path: of keys in the tree; below "layers" when `layered`.
        name: of the tensor; with a place for the layer's number when `layered`.
        shape: ours, of one layer.
        contracted: how many of our first axes the model contracts; 0 for embeddings and norm scales, which stay.
        layered: whether there is one tensor per layer, and our leaf stacks them on a first axis.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    contracted: int
    layered: bool = False

    def tensor(self, layer: int) -> str:
        """The tensor's name for a layer; the same for all layers when there is only one."""
        return self.name.format(layer) if self.layered else self.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of a tensor in the file."""
        if self.contracted == 0:
            return self.shape
        return math.prod(self.shape[self.contracted :]), math.prod(self.shape[: self.contracted])


class Source(Protocol):
    """Where tensors come from: files of one model."""

    where: str

    def names(self) -> Iterable[str]:
        """Every tensor's name, in transformers' dialect."""

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and dtype; of another dtype than `DTYPES` it can't be read."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor: one slice with a start and an end per axis."""


def model_leaves(config: LlamaConfig, reward: bool) -> list[Leaf]:
    """Every parameter of a model, in the order in which files are written."""
    d, v, f = config.hidden_size, config.vocab_size, config.intermediate_size
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim

    def layer(ours: str, theirs: str, shape: tuple[int, ...], contracted: int) -> Leaf:
        return Leaf(("layers", *ours.split("/")), f"model.layers.{{}}.{theirs}.weight", shape, contracted, True)

    leaves = [
        Leaf(("embedding",), "model.embed_tokens.weight", (v, d), 0),
        layer("attention_norm/scale", "input_layernorm", (d,), 0),
        layer("attention/query/kernel", "self_attn.q_proj", (d, n, h), 1),
        layer("attention/key/kernel", "self_attn.k_proj", (d, k, h), 1),
        layer("attention/value/kernel", "self_attn.v_proj", (d, k, h), 1),
        layer("attention/output/kernel", "self_attn.o_proj", (n, h, d), 2),
        layer("mlp_norm/scale", "post_attention_layernorm", (d,), 0),
        layer("mlp/gate/kernel", "mlp.gate_proj", (d, f), 1),
        layer("mlp/up/kernel", "mlp.up_proj", (d, f), 1),
        layer("mlp/down/kernel", "mlp.down_proj", (f, d), 1),
        Leaf(("norm", "scale"), "model.norm.weight", (d,), 0),
    ]
    if not config.tie_embeddings:
        leaves.append(Leaf(("lm_head", "kernel"), "lm_head.weight", (d, v), 1))
    return [*leaves, Leaf((HEAD, "kernel"), "score.weight", (d,), 1)] if reward else leaves


def check_source(config: LlamaConfig, reward: bool, source: Source) -> None:
    """See that all tensors are there, in the right shape, and no others; nothing is read yet.

    Raises:
        InputError: names a tensor that is missing, left over, of another shape or of a dtype that can't be read.
    """
    left = set(source.names())
    for leaf in model_leaves(config, reward):
        for layer in range(config.num_layers if leaf.layered else 1):
            name, wanted = leaf.tensor(layer), leaf.stored_shape
            if name not in left:
                raise InputError(f"{source.where}: tensor {name} is missing; the config asks for one of shape {wanted}")
            left.remove(name)
            shape, dtype = source.describe(name)
            if shape != wanted:
                raise InputError(f"{source.where}: tensor {name} has shape {shape}, but the config says {wanted}")
            if dtype not in DTYPES:
                raise InputError(f"{source.where}: tensor {name} is {dtype}; expected one of {', '.join(DTYPES)}")
    # Tied models may store their embedding twice; old exports stored rotary frequencies, which follow from the config.
    redundant = {"lm_head.weight"} if config.tie_embeddings else set()
    left = {name for name in left - redundant if not name.endswith("rotary_emb.inv_freq")}
    if left:
        raise InputError(f"{source.where}: tensor {min(left)} has no place in a LLaMA ({len(left)} such in all)")


def common_dtype(config: LlamaConfig, reward: bool, source: Source) -> str:
    """The dtype of a checked source's tensors, or float32 when they differ."""
    layers = range(config.num_layers)
    found = {source.describe(leaf.tensor(layer))[1] for leaf in model_leaves(config, reward) for layer in layers}
    return found.pop() if len(found) == 1 else "float32"


def read_params(
    config: LlamaConfig, reward: bool, source: Source, dtype: str | None, placement: Params | None
) -> Params:
    """Read a model, each part straight onto its device.

    Args:
        config: the model's shape; layers come stacked.
        reward: whether it has a scalar head.
        source: of the tensors.
        dtype: of the parameters; None keeps the stored one (float32 where the layers of a parameter differ).
        placement: a tree of shardings; None gives NumPy arrays.

    Raises:
        InputError: the source isn't this model; see `check_source`.
    """
    check_source(config, reward, source)
    tree: Params = {}
    for leaf in model_leaves(config, reward):
        node, where = tree, placement
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
            where = None if where is None else where[key]
        sharding = None if where is None else where[leaf.path[-1]]
        node[leaf.path[-1]] = _read_leaf(config, leaf, source, dtype, sharding)
    return tree


def _read_leaf(config: LlamaConfig, leaf: Leaf, source: Source, dtype: str | None, sharding: Sharding | None) -> Any:
    layers = config.num_layers if leaf.layered else 1
    stored = {source.describe(leaf.tensor(layer))[1] for layer in range(layers)}
    kind = jnp.dtype(dtype or (stored.pop() if len(stored) == 1 else "float32"))
    shape = (layers, *leaf.shape) if leaf.layered else leaf.shape
    if sharding is None:
        return _read_part(leaf, source, kind, shape, tuple(slice(0, size) for size in shape))
    parts, read = [], dict[tuple[tuple[int, int], ...], np.ndarray]()
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        if bounds not in read:
            read[bounds] = _read_part(leaf, source, kind, shape, tuple(slice(*bound) for bound in bounds))
        parts.append(jax.device_put(read[bounds], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read_part(
    leaf: Leaf, source: Source, dtype: np.dtype[Any], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of our leaf of the given shape, in a buffer of its own."""
    part = _aligned(tuple(axis.stop - axis.start for axis in index), dtype)
    if not leaf.layered:
        _fill(part, leaf, source, leaf.name, index)
        return part
    for place, layer in enumerate(range(index[0].start, index[0].stop)):
        _fill(part[place], leaf, source, leaf.tensor(layer), index[1:])
    return part


def _fill(part: np.ndarray, leaf: Leaf, source: Source, name: str, index: tuple[slice, ...]) -> None:
    """Read a part of one tensor into a buffer, some of the file's rows after the other."""
    # The axis of ours that the file's rows begin with; the scalar head's tensor has only one row.
    axis = leaf.contracted
    if axis == len(index):
        part[...] = _ours(leaf, source, name, index)
        return
    start, stop = index[axis].start, index[axis].stop
    row_bytes = 4 * part.size // max(stop - start, 1)
    step = max(BLOCK_BYTES // max(row_bytes, 1), 1)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        place = (slice(None),) * axis + (slice(first - start, last - start),)
        part[place] = _ours(leaf, source, name, (*index[:axis], slice(first, last), *index[axis + 1 :]))


def _ours(leaf: Leaf, source: Source, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of one tensor in our layout: their rows are our last axes, their columns those that are contracted."""
    if leaf.contracted == 0:
        return source.read(name, index)
    cut = leaf.contracted
    rows, columns = _span(leaf.shape[cut:], index[cut:]), _span(leaf.shape[:cut], index[:cut])
    read = source.read(name, (rows, columns)).T
    within = tuple(slice(None) if place in (0, cut) else axis for place, axis in enumerate(index))
    lengths = [
        axis.stop - axis.start if place in (0, cut) else size
        for place, (axis, size) in enumerate(zip(index, leaf.shape, strict=True))
    ]
    return read.reshape(lengths)[within]


def _span(shape: tuple[int, ...], index: tuple[slice, ...]) -> slice:
    """The range, on axes laid out as one, that holds a range of the first of them and all of the others."""
    if not shape:
        return slice(0, 1)
    inner = math.prod(shape[1:])
    return slice(index[0].start * inner, index[0].stop * inner)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def theirs(leaf: Leaf, array: np.ndarray) -> np.ndarray:
    """One layer of our leaf in their layout [out, in]; embeddings and norm scales stay."""
    if leaf.contracted == 0:
        return array
    return array.reshape(leaf.stored_shape[::-1]).T
