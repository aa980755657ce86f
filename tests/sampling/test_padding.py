"""Shapes that few programs are compiled for."""

from almost_jax.sampling.padding import bucket_length


def test_bucket_length_by_hand():
    assert [bucket_length(n, 16) for n in (0, 1, 15, 16, 17, 32, 33)] == [16, 16, 16, 16, 32, 32, 48]
    assert bucket_length(7, 1) == 7
