import itertools

import pytest

from almost_jax.sampling.selection import best_of


def test_11_the_chosen_text_does_not_depend_on_the_order() -> None:
    candidates = [("b", 0.7), ("a", 0.7), ("c", -1.0), ("aa", 0.7), ("d", 0.69)]
    for shuffled in itertools.permutations(candidates):
        texts, scores = zip(*shuffled, strict=True)
        assert texts[best_of(texts, scores)] == "a"
    assert best_of(["same", "same", "z"], [1.0, 1.0, 0.0]) == 0
    assert best_of(["x", "y"], [-2.0, float("-inf")]) == 0
    assert best_of(["only"], [3.0]) == 0


def test_11_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        best_of(["a", "b"], [1.0, float("nan")])
    with pytest.raises(ValueError, match="got 0 and 0"):
        best_of([], [])
    with pytest.raises(ValueError, match="got 2 and 1"):
        best_of(["a", "b"], [1.0])
