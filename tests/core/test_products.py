"""Products with written-out gradients against autodiff's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.core.products import contract, tied_logits


@pytest.mark.parametrize(
    ("x", "kernel", "contracted"),
    [((2, 5, 6), (6, 9), 1), ((2, 5, 9), (9, 4), 1), ((2, 5, 6), (6, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 6), 2)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_plain_product(
    x: tuple[int, ...], kernel: tuple[int, ...], contracted: int, dtype: str
) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    left, right = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, (x, kernel), strict=False))
    ends = tuple(range(len(x) - contracted, len(x))), tuple(range(contracted))

    def plain(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (ends, ((), ())))

    found, back = jax.vjp(lambda a, b: contract(a, b, contracted, left.dtype), left, right)
    expected, forth = jax.vjp(plain, left, right)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
    weights = jax.random.normal(keys[2], expected.shape).astype(dtype)
    tolerance = 1e-5 if dtype == "float32" else 0.06
    for ours, theirs, given in zip(back(weights), forth(weights), (left, right), strict=True):
        assert ours.dtype == given.dtype and ours.shape == given.shape
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("shape", [(6, 9), (9, 4)])
def test_bfloat16_products_are_accumulated_in_float32_and_rounded_once(shape: tuple[int, int]) -> None:
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 5, shape[0])).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], shape)
    wide_x, rounded = np.asarray(x, np.float64), np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    found, back = jax.vjp(lambda a, b: contract(a, b, 1, jnp.float32), x, kernel)
    np.testing.assert_allclose(found, wide_x @ rounded, rtol=1e-5, atol=1e-5)
    narrow = contract(x, kernel, 1, x.dtype)
    np.testing.assert_array_equal(np.asarray(narrow), np.asarray(found.astype(jnp.bfloat16)))
    slope = jax.random.normal(keys[2], found.shape).astype(jnp.bfloat16)
    to_x, to_kernel = back(slope.astype(jnp.float32))
    assert to_x.dtype == jnp.bfloat16 and to_kernel.dtype == jnp.float32
    # The parameter is float32, so its gradient is not rounded to bfloat16 on the way.
    expected = np.einsum("btd,bto->do", wide_x, np.asarray(slope, np.float64))
    np.testing.assert_allclose(to_kernel, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_tied_logits_are_those_of_the_einsum() -> None:
    keys = jax.random.split(jax.random.key(2), 3)
    hidden, table = jax.random.normal(keys[0], (2, 5, 6)), jax.random.normal(keys[1], (11, 6))
    weights = jax.random.normal(keys[2], (2, 5, 11))
    found, back = jax.vjp(tied_logits, hidden, table)
    expected, forth = jax.vjp(lambda h, e: jnp.einsum("btd,vd->btv", h, e), hidden, table)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(back(weights), forth(weights), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
