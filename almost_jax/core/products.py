"""Matrix products whose gradients a CPU computes without transposing activations first.

Autodiff writes the gradient of a kernel as a product in the other order and transposes it; a CPU's compiler turns that
into a strided copy of the activations, with all that they are computed from moved into it. Written in the kernel's own
order there is nothing to copy (LOG.md has figures). Other devices choose layouts by themselves.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Array, kernel: Array, contracted: int) -> Array:
    """Contract the last `contracted` axes of x with the first ones of a kernel of the same dtype."""
    ends = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, kernel, (ends, ((), ())))


def _forward(x: Array, kernel: Array, contracted: int) -> tuple[Array, tuple[Array, Array]]:
    return contract(x, kernel, contracted), (x, kernel)


def _backward(contracted: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - contracted))
    outputs = kernel.ndim - contracted
    last = tuple(range(gradient.ndim - outputs, gradient.ndim)), tuple(range(contracted, kernel.ndim))
    to_x = jax.lax.dot_general(gradient, kernel, (last, ((), ())))
    # One of the two must lie with its columns together after all: the one with fewer of them.
    if math.prod(kernel.shape[:contracted]) <= math.prod(kernel.shape[contracted:]):
        to_kernel = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
    else:
        turned = jax.lax.dot_general(gradient, x, ((rows, rows), ((), ())))
        to_kernel = jnp.moveaxis(turned, tuple(range(outputs)), tuple(range(-outputs, 0)))
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


contract.defvjp(_forward, _backward)


@jax.custom_vjp
def tied_logits(hidden: Array, table: Array) -> Array:
    """Logits [B, T, V] of hidden states [B, T, D] by the embedding [V, D], both float32."""
    return jax.lax.dot_general(hidden, table, (((2,), (1,)), ((), ())))


def _tied_forward(hidden: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return tied_logits(hidden, table), (hidden, table)


def _tied_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, table = kept
    to_hidden = jax.lax.dot_general(gradient, table, (((2,), (0,)), ((), ())))
    to_table = jax.lax.dot_general(gradient, hidden, (((0, 1), (0, 1)), ((), ())))
    return to_hidden, to_table


tied_logits.defvjp(_tied_forward, _tied_backward)
