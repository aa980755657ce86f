"""How training programs run on the mesh: rematerialisation, the attention kernel, explicit FSDP.

None of it changes what is computed beyond rounding; all of it is in the experiment's `mesh:` section.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh

from almost_jax.config import MeshConfig
from almost_jax.core.gathering import EXPLICIT_RULES, Gather, explicitly
from almost_jax.core.heads import HEAD, head_axes
from almost_jax.core.llama import LlamaConfig, Params, abstract_params, logical_axes
from almost_jax.core.partitioning import platform, shardings
from almost_jax.core.train import Spread
from almost_jax.errors import InputError


def training_shape(config: LlamaConfig, settings: MeshConfig, mesh: Mesh) -> LlamaConfig:
    """A model's config as a training step runs it.

    Args:
        config: the model's shape.
        settings: the experiment's mesh section.
        mesh: its devices.

    Raises:
        InputError: the model can't be split as asked for.
    """
    gather = None
    if settings.explicit:
        gather = Gather(mesh.shape["data"], mesh.shape["fsdp"], settings.gradient_dtype)
        for path, axes in _leaves(logical_axes(config)):
            shape = functools.reduce(lambda tree, entry: tree[entry.key], path, _shapes(config))
            try:
                gather.local_shape(shape, axes)
            except ValueError as error:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(f"mesh.explicit: {name}: {error}") from error
    return dataclasses.replace(
        config, remat=settings.remat, gather=gather, attention=attention(settings, settings.explicit or mesh.size == 1),
        vocab_chunk=head_chunk(settings),
    )  # fmt: skip


def judging_shape(config: LlamaConfig, settings: MeshConfig, mesh: Mesh) -> LlamaConfig:
    """A model's config as it judges whole rows, in a program that the compiler splits over the mesh."""
    return dataclasses.replace(
        config, attention=attention(settings, mesh.size == 1), vocab_chunk=head_chunk(settings)
    )


def attention(settings: MeshConfig, alone: bool) -> str:
    """The attention of a program on the platform that is traced for, "splash", "blocks" or "plain".

    Args:
        settings: the experiment's mesh section.
        alone: whether every device sees its own rows alone; the compiler can't split the kernel.
    """
    if settings.attention == "splash" and platform() == "cpu":
        return "blocks"
    return "splash" if settings.attention == "splash" and platform() == "tpu" and alone else "plain"


def head_chunk(settings: MeshConfig) -> int:
    """How many entries of the vocabulary the head is applied to at a time on the platform that is traced for."""
    return settings.vocab_chunk_cpu if platform() == "cpu" else settings.vocab_chunk


def training_shardings(config: LlamaConfig, settings: MeshConfig, mesh: Mesh, head: bool) -> Params:
    """Where every parameter of a training state lies.

    Args:
        config: the model's shape.
        settings: the experiment's mesh section.
        mesh: its devices.
        head: whether the tree has a scalar head.
    """
    axes = {**logical_axes(config), **(head_axes() if head else {})}
    found: Params = shardings(axes, mesh, EXPLICIT_RULES if settings.explicit else None)
    return found


def training_spread(settings: MeshConfig, mesh: Mesh, placement: Any) -> Spread | None:
    """What makes a step's sums run on every device's own rows, given where the parameters lie; None leaves that to
    the compiler.

    Raises:
        InputError: the mesh has a tensor axis.
    """
    if not settings.explicit:
        return None
    if mesh.shape["tensor"] != 1:
        raise InputError(f"mesh.explicit: needs mesh.tensor 1, not {mesh.shape['tensor']}; use data and fsdp")
    specs = jax.tree.map(lambda sharding: sharding.spec, placement)
    return functools.partial(explicitly, mesh=mesh, param_specs=specs)


def placed_for_training(params: Params, config: LlamaConfig, settings: MeshConfig, mesh: Mesh) -> Params:
    """The parameters where a training state has them; unchanged when the compiler places them."""
    if not settings.explicit:
        return params
    return jax.device_put(params, training_shardings(config, settings, mesh, HEAD in params))


def _leaves(axes: Params) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))


def _shapes(config: LlamaConfig) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
