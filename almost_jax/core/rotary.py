"""Rotary position embeddings (Su et al., 2021), with the scalings of Hugging Face's LLaMA checkpoints.

Letters: B batch, T time, H head size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `theta` is the base; the other fields belong to `linear` and `llama3` scaling."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope type {self.kind!r} can't be run faithfully; known: default, linear, llama3")


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Array:
    """Angular frequencies [H / 2] in float32, after scaling.

    `linear` divides all of them by `factor`; `llama3` divides those of wavelengths longer than the original context
    over `low_freq_factor`, keeps those shorter than it over `high_freq_factor`, and blends between (Llama 3.1).
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (jnp.float32(rope.theta) ** exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        context = rope.original_max_position_embeddings
        wavelengths = 2 * jnp.pi / frequencies
        keep = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return frequencies * keep + frequencies / rope.factor * (1 - keep)
    return frequencies


@functools.lru_cache(maxsize=32)
def rotary_table(rope: RopeConfig, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [T, H / 2] float32 of positions 0..T-1, as constants of a program.

    A CPU's compiler would move their computation into the rotation and do it for every head of every layer anew.
    """
    # Inside `jax.shard_map` constants would take its manual mesh for their own.
    nowhere = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), nowhere:
        angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rope_frequencies(rope, head_dim)[None, :]
        return np.asarray(jnp.cos(angles)), np.asarray(jnp.sin(angles))


def rotate(x: Array, positions: Array | tuple[Array, Array], rope: RopeConfig) -> Array:
    """Apply rotary position embeddings, halves paired as in Hugging Face's LLaMA.

    Args:
        x: [B, T, heads, H].
        positions: [B, T] int32, absolute; or their cosines and sines, [B or 1, T, H / 2] float32 each.
        rope: the embedding.
    """
    if isinstance(positions, tuple):
        cos, sin = positions
    else:
        angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(rope, x.shape[-1])[None, None, :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
