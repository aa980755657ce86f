"""Means, shares, differences and intervals, against cases computed by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from almost_jax.evaluation.statistics import (
    Bootstrap,
    agreement,
    clusters,
    correlation,
    difference,
    exact_interval,
    interval,
    quantile_bins,
    share_interval,
    t_interval,
    weighted_clusters,
)

BOOTSTRAP = Bootstrap(samples=999, seed=5)


def test_mean_pools_scores_over_queries() -> None:
    # (1 + 0 + 0.5) + 0.5 over 4 scores; the mean of query means would be 0.5.
    quantity = clusters({"a": [1.0, 0.0, 0.5], "b": [0.2]}, ["a", "b", "unanswered"])
    assert quantity.mean == pytest.approx(1.7 / 4)
    assert quantity.n == 4


def test_weights_count() -> None:
    quantity = weighted_clusters([("a", 2.0, 1.0), ("b", 0.5, 0.0), ("b", 0.5, 1.0)], ["a", "b"])
    assert quantity.mean == pytest.approx(2.5 / 3)
    assert quantity.n == 3


def test_a_score_of_an_unknown_query_is_refused() -> None:
    with pytest.raises(ValueError, match="'stranger'"):
        clusters({"stranger": [1.0]}, ["a"])


def test_interval_covers_like_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 2.0, 400)
    quantity = clusters({str(i): [value] for i, value in enumerate(values)}, [str(i) for i in range(400)])
    low, high = interval(quantity, Bootstrap(4000, 1))["ci95"]
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half + 0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half + 0.01)


def test_interval_resamples_queries_not_scores() -> None:
    # Fifty copies of each of 10 queries' scores say no more than one copy does.
    scores = {str(i): [float(i % 2)] for i in range(10)}
    copies = {query: group * 50 for query, group in scores.items()}
    once = interval(clusters(scores, list(scores)), BOOTSTRAP)
    often = interval(clusters(copies, list(scores)), BOOTSTRAP)
    assert once["ci95"] == often["ci95"]
    assert (once["n"], often["n"]) == (10, 500)


def test_constant_scores_have_a_point_interval() -> None:
    assert interval(clusters({"a": [0.7], "b": [0.7]}, ["a", "b"]), BOOTSTRAP)["ci95"] == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize(("hits", "n"), [(0, 4), (4, 4), (3, 7), (1, 80)])
def test_the_exact_interval_is_scipys(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    assert exact_interval(hits / n, n) == pytest.approx([expected.low, expected.high])


def test_a_share_on_which_all_agree_is_not_certain() -> None:
    queries = ["a", "b", "c", "unanswered"]
    sure = share_interval(clusters({query: [1.0] for query in "abc"}, queries), BOOTSTRAP)
    # No hit missing in three: 0.025 ** (1 / 3).
    assert sure["ci95"] == pytest.approx([0.2924, 1.0], abs=1e-4) and (sure["mean"], sure["n"]) == (1.0, 3)
    # Copies of a query's score say no more than one of them, and a light query less than a heavy one.
    often = share_interval(clusters({query: [1.0] * 9 for query in "abc"}, queries), BOOTSTRAP)
    assert often["ci95"] == pytest.approx(sure["ci95"]) and often["n"] == 27
    light = share_interval(weighted_clusters([("a", 1.0, 1.0), ("b", 0.1, 1.0)], queries), BOOTSTRAP)
    assert light["ci95"] == pytest.approx(exact_interval(1.0, 1.21 / 1.01))
    ties = share_interval(clusters({query: [0.5] for query in "abc"}, queries), BOOTSTRAP)
    assert ties["ci95"][0] == pytest.approx(1 - ties["ci95"][1]) and ties["ci95"][1] > 0.9
    mixed = clusters({"a": [1.0], "b": [0.0], "c": [1.0]}, queries)
    assert share_interval(mixed, BOOTSTRAP) == interval(mixed, BOOTSTRAP)


def test_intervals_are_reproducible_and_follow_the_seed() -> None:
    quantity = clusters({str(i): [i / 7] for i in range(30)}, [str(i) for i in range(30)])
    assert interval(quantity, BOOTSTRAP) == interval(quantity, BOOTSTRAP)
    assert interval(quantity, BOOTSTRAP)["ci95"] != interval(quantity, Bootstrap(999, 6))["ci95"]


def test_difference_is_paired_over_queries() -> None:
    # Queries differ much, systems by exactly 0.1 on each: a paired interval is a point, an unpaired one is wide.
    rng = np.random.default_rng(3)
    base = {str(i): [value] for i, value in enumerate(rng.normal(0, 5, 50))}
    better = {query: [group[0] + 0.1] for query, group in base.items()}
    found = difference(clusters(better, list(base)), clusters(base, list(base)), BOOTSTRAP)
    assert found["difference"] == pytest.approx(0.1)
    assert found["ci95"] == pytest.approx([0.1, 0.1])
    assert found["significant"] is True
    assert found["n"] == 50


def test_difference_of_equals_is_not_significant_and_swapping_mirrors() -> None:
    rng = np.random.default_rng(4)
    queries = [str(i) for i in range(80)]
    first = clusters({query: [float(rng.normal())] for query in queries}, queries)
    second = clusters({query: [float(rng.normal())] for query in queries}, queries)
    there, back = difference(first, second, BOOTSTRAP), difference(second, first, BOOTSTRAP)
    assert there["significant"] is False
    assert there["difference"] == -back["difference"]
    assert there["ci95"] == pytest.approx([-back["ci95"][1], -back["ci95"][0]])


def test_nothing_to_count_is_an_error() -> None:
    empty, some = clusters({}, ["a"]), clusters({"a": [1.0]}, ["a"])
    assert math.isnan(empty.mean)
    with pytest.raises(ValueError, match="no scores"):
        interval(empty, BOOTSTRAP)
    with pytest.raises(ValueError, match="no scores"):
        difference(some, empty, BOOTSTRAP)


def test_agreement_counts_ties_half() -> None:
    cases = [(0.3, 0.1), (-2, -1), (0.3, -0.1), (0, 0.4), (0.4, 0), (0, 0)]
    assert [agreement(margin, truth) for margin, truth in cases] == [1, 1, 0, 0.5, 0.5, 0.5]


def test_t_interval_by_hand_and_against_scipy() -> None:
    # mean 2, standard deviation 1, n 3: half-width 4.302653 / sqrt(3).
    found = t_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)], rel=1e-6)
    values = [0.31, 0.5, 0.44, 0.71]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values)["ci95"] == pytest.approx(list(expected))
    assert t_interval([0.5]) == {"mean": 0.5, "ci95": None, "n": 1}
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_quantile_bins_partition_and_keep_equals_together() -> None:
    values = [5, 1, 1, 1, 9, 7, 3, 1]
    bins = quantile_bins(values, 4)
    assert sorted(int(index) for group in bins for index in group) == list(range(8))
    assert [sorted(values[index] for index in group) for group in bins] == [[1, 1, 1, 1], [3, 5], [7, 9]]
    assert quantile_bins([], 3) == []
    assert len(quantile_bins([2.0, 2.0], 5)) == 1


def test_correlation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 2, 3], [4, 4, 4]) is None
