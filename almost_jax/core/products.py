"""Matrix products as a CPU computes them fast, and their gradients without transposing activations first.

Autodiff writes the gradient of a kernel as a product in the other order and transposes it; a CPU's compiler turns that
into a strided copy of the activations, with all that they are computed from moved into it. Written in the kernel's own
order there is nothing to copy (LOG.md has figures). Other devices choose layouts by themselves.

Products of bfloat16 are accumulated in float32 and asked for in float32, then rounded once: asked for in bfloat16, a
CPU converts both operands to float32 first and leaves its matrix unit alone (LOG.md has figures).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def accumulate(left: Array, right: Array, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """`dot_general` over the axes that are contracted in each, of two arrays of one dtype, in float32."""
    return jax.lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def contract(x: Array, kernel: Array, contracted: int, dtype: Any) -> Array:
    """Contract the last `contracted` axes of x with the first ones of a kernel, in the dtype of x.

    The product comes in `dtype`, the kernel's gradient in the kernel's own, unrounded where that is wider than x's.
    """
    ends = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    return accumulate(x, kernel.astype(x.dtype), ends).astype(dtype)


def _forward(x: Array, kernel: Array, contracted: int, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return contract(x, kernel, contracted, dtype), (x, kernel)


def _backward(contracted: int, _: Any, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - contracted))
    outputs = kernel.ndim - contracted
    last = tuple(range(gradient.ndim - outputs, gradient.ndim)), tuple(range(contracted, kernel.ndim))
    to_x = accumulate(gradient, kernel.astype(x.dtype), last)
    # One of the two must lie with its columns together after all: the one with fewer of them. In bfloat16 not by a
    # turned product: the compiler makes one of it whose operands both are turned, for which it has no kernel.
    if x.dtype != jnp.float32 or math.prod(kernel.shape[:contracted]) <= math.prod(kernel.shape[contracted:]):
        to_kernel = accumulate(x, gradient, (rows, rows))
    else:
        turned = accumulate(gradient, x, (rows, rows))
        to_kernel = jnp.moveaxis(turned, tuple(range(outputs)), tuple(range(-outputs, 0)))
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


contract.defvjp(_forward, _backward)


@jax.custom_vjp
def tied_logits(hidden: Array, table: Array) -> Array:
    """Float32 logits [B, T, V] of hidden states [B, T, D] by the embedding [V, D], multiplied in the states' dtype."""
    return accumulate(hidden, table.astype(hidden.dtype), ((2,), (1,)))


def _tied_forward(hidden: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return tied_logits(hidden, table), (hidden, table)


def _tied_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, table = kept
    slope = gradient.astype(hidden.dtype)
    to_hidden = accumulate(slope, table.astype(hidden.dtype), ((2,), (0,)))
    to_table = accumulate(slope, hidden, ((0, 1), (0, 1)))
    return to_hidden.astype(hidden.dtype), to_table.astype(table.dtype)


tied_logits.defvjp(_tied_forward, _tied_backward)
