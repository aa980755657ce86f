"""The source of all randomness of a request: the seed, and the request's id."""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from almost_jax.sampling.sampler import request_keys


def request_key(seed: int, request_id: str) -> Array:
    """The typed key of a request: a function of the seed and the id alone."""
    data = request_keys(jnp.asarray(root_data(seed)), jnp.asarray(id_words([request_id], 1)))
    key: Array = jax.random.wrap_key_data(data[0])
    return key


def root_data(seed: int) -> np.ndarray:
    """The data [2] uint32 of a seed's key."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def id_words(ids: Sequence[str], count: int) -> np.ndarray:
    """Two 32-bit words of each id's SHA-256, [count, 2] uint32; 0 behind the last."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in ids)
    words = np.zeros((count, 2), np.uint32)
    words[: len(ids)] = np.frombuffer(digests, "<u4").reshape(len(ids), 2)
    return words
