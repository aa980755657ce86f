"""Padding, and the order of examples."""

import numpy as np
import pytest

from almost_jax.errors import InputError
from almost_jax.io.batches import batch_indices, epoch_order, pad


def test_pad_by_hand():
    tokens, lengths = pad([[5, 6, 7], [], (9,)], 4, 3)
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 3], [3, 3, 3, 3], [9, 3, 3, 3]])
    np.testing.assert_array_equal(lengths, [3, 0, 1])
    assert tokens.dtype == np.int32 and lengths.dtype == np.int32
    tokens, lengths = pad([], 4, 0)
    assert tokens.shape == (0, 4) and lengths.shape == (0,)
    with pytest.raises(InputError, match="sequence 1 has 5 tokens"):
        pad([[1], [1] * 5], 4, 0)


def test_epoch_orders_are_permutations_that_differ():
    orders = [tuple(epoch_order(seed, epoch, 37)) for seed in (0, 1, 2**31 - 1) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(37)) for order in orders)
    # Written down once: the order of a seed must never change, or old runs can't be resumed.
    assert epoch_order(7, 3, 11).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1, 10]


@pytest.mark.parametrize(("batch_size", "n"), [(4, 11), (5, 10), (7, 3), (1, 1), (16, 16)])
def test_28_batches_cover_every_epoch_once(batch_size: int, n: int):
    stream = np.concatenate([batch_indices(step, batch_size, n, 5) for step in range(3 * n)])
    assert stream.shape == (3 * n * batch_size,)
    epochs = stream.reshape(-1, n)
    for epoch, order in enumerate(epochs):
        np.testing.assert_array_equal(order, epoch_order(5, epoch, n))


def test_no_examples_is_an_error():
    with pytest.raises(InputError, match="0 examples"):
        batch_indices(0, 4, 0, 1)
