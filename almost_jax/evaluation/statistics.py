"""Means, shares and differences with intervals.

Every interval here is a 95% percentile bootstrap over *queries*: the responses to one query are resampled together,
since they share its difficulty. A mean is a ratio of two sums over queries (a total and a count), so one routine serves
means per query, shares of pairs and their differences. There are two exceptions: `t_interval` is over the few points of
a sweep, and a share on which all queries agree has an exact interval (`share_interval`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv, stdtrit

LEVEL = 0.95
_CHUNK = 64  # resamples drawn at once: bounds the index matrix at _CHUNK x queries


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: the number of resamples and the seed of their generator."""

    samples: int
    seed: int


@dataclass(frozen=True)
class Clusters:
    """A quantity summed within each query: its mean is the sum of `totals` over the sum of `counts`.

    totals, counts: [Q] float64, aligned over queries. A query with count 0 contributes nothing.
    """

    totals: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """The pooled mean; NaN when nothing was counted."""
        count = float(self.counts.sum())
        return float(self.totals.sum()) / count if count else math.nan

    @property
    def n(self) -> int:
        """How many scores were counted, by weight."""
        return round(float(self.counts.sum()))


def clusters(scores: Mapping[str, Sequence[float]], queries: Sequence[str]) -> Clusters:
    """Sums the scores of each query, in the order of `queries`.

    Args:
        scores: query id -> its scores; a query without scores may be absent.
        queries: every query id, in the order shared by quantities that will be compared.

    Raises:
        ValueError: a score belongs to no query of the list.
    """
    return weighted_clusters([(query, 1.0, score) for query, group in scores.items() for score in group], queries)


def weighted_clusters(rows: Iterable[tuple[str, float, float]], queries: Sequence[str]) -> Clusters:
    """`clusters` of scores that count with weights: rows are (query id, weight, score)."""
    place = {query: index for index, query in enumerate(queries)}
    totals, counts = np.zeros(len(queries)), np.zeros(len(queries))
    for query, weight, score in rows:
        if query not in place:
            raise ValueError(f"a score of query {query!r}, which is not among the {len(queries)} queries")
        totals[place[query]] += weight * score
        counts[place[query]] += weight
    return Clusters(totals, counts)


def _resampled_means(quantities: Sequence[Clusters], bootstrap: Bootstrap) -> np.ndarray:
    """Bootstrap means [quantities, samples], all of them over the same resampled queries."""
    size = len(quantities[0].totals)
    if any(len(quantity.totals) != size for quantity in quantities):
        raise ValueError(f"quantities over different queries: {[len(quantity.totals) for quantity in quantities]}")
    generator = np.random.default_rng(bootstrap.seed)
    means = []
    for start in range(0, bootstrap.samples, _CHUNK):
        rows = generator.integers(0, size, size=(min(_CHUNK, bootstrap.samples - start), size))
        sums = [(quantity.totals[rows].sum(axis=1), quantity.counts[rows].sum(axis=1)) for quantity in quantities]
        means.append(np.stack([total / np.where(count > 0, count, np.nan) for total, count in sums]))
    return np.concatenate(means, axis=1)


def _percentiles(values: np.ndarray) -> list[float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return [float(low), float(high)]


def interval(quantity: Clusters, bootstrap: Bootstrap) -> dict[str, Any]:
    """{"mean", "ci95": [low, high], "n"} of a quantity, resampling queries.

    Raises:
        ValueError: nothing was counted, so there is no mean.
    """
    if not quantity.n:
        raise ValueError("no scores to take a mean of")
    return {
        "mean": quantity.mean,
        "ci95": _percentiles(_resampled_means([quantity], bootstrap)[0]),
        "n": quantity.n,
    }


def share_interval(quantity: Clusters, bootstrap: Bootstrap) -> dict[str, Any]:
    """`interval` of a share, a mean of scores from 0 to 1.

    Where all queries agree, all resamples do too, and the bootstrap would know the share exactly from one query: then
    the interval is that of `exact_interval` for as many draws as there are queries, or as their weights are worth
    (Kish's effective size).
    """
    found = interval(quantity, bootstrap)
    counts = quantity.counts[quantity.counts > 0]
    if np.ptp(quantity.totals[quantity.counts > 0] / counts) > 1e-9:
        return found
    return {**found, "ci95": exact_interval(found["mean"], float(counts.sum() ** 2 / np.square(counts).sum()))}


def exact_interval(share: float, n: float) -> list[float]:
    """The 95% interval of Clopper and Pearson (Biometrika 1934) for `share` of `n` draws; a tie may count half.

    Args:
        share: from 0 to 1.
        n: of draws, above 0.

    Returns:
        [low, high], within 0 to 1.
    """
    hits = min(max(share, 0.0), 1.0) * n
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return [low, high]


def difference(first: Clusters, second: Clusters, bootstrap: Bootstrap) -> dict[str, Any]:
    """{"difference", "ci95", "significant", "n"} of the means, first - second, resampling queries for both at once.

    `significant` says that the interval leaves out 0, on either side; `n` is the number of queries that both cover.

    Raises:
        ValueError: one of them counted nothing, or they are over different queries.
    """
    if not first.n or not second.n:
        raise ValueError("no scores to take a difference of")
    means = _resampled_means([first, second], bootstrap)
    low, high = _percentiles(means[0] - means[1])
    return {
        "difference": first.mean - second.mean,
        "ci95": [low, high],
        "significant": bool(low > 0 or high < 0),
        "n": int(((first.counts > 0) & (second.counts > 0)).sum()),
    }


def paired_intercept(values: Sequence[float], others: Sequence[float], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """The mean of paired differences that a second quantity does not explain: the intercept of a least-squares line.

    Args:
        values: [n] one difference a query, in score.
        others: [n] the same query's difference in the quantity to hold equal, such as length.
        bootstrap: how the interval is drawn, over queries.

    Returns:
        {"difference", "ci95", "significant", "n"}; None for fewer than three queries.
    """
    y, x = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if len(y) < 3:
        return None

    def intercept(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Over the last axis; a quantity that does not vary explains nothing."""
        mean_x, mean_y = x.mean(axis=-1), y.mean(axis=-1)
        variance = ((x - mean_x[..., None]) ** 2).mean(axis=-1)
        covariance = ((x - mean_x[..., None]) * (y - mean_y[..., None])).mean(axis=-1)
        slope = np.divide(covariance, variance, out=np.zeros_like(covariance), where=variance > 0)
        found: np.ndarray = mean_y - slope * mean_x
        return found

    generator = np.random.default_rng(bootstrap.seed)
    drawn = []
    for start in range(0, bootstrap.samples, _CHUNK):
        rows = generator.integers(0, len(y), size=(min(_CHUNK, bootstrap.samples - start), len(y)))
        drawn.append(intercept(y[rows], x[rows]))
    low, high = _percentiles(np.concatenate(drawn))
    return {
        "difference": float(intercept(y[None], x[None])[0]),
        "ci95": [low, high],
        "significant": bool(low > 0 or high < 0),
        "n": len(y),
    }


def agreement(margin: float, truth: float) -> float:
    """1 when a margin has the sign of the true one, 0 when it has the other, 0.5 when either is a tie."""
    if margin == 0 or truth == 0:
        return 0.5
    return float((margin > 0) == (truth > 0))


def t_interval(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "ci95", "n"} of a few independent values by Student's t with n - 1 degrees of freedom.

    With one value there is no interval and ci95 is None.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to take a mean of")
    mean, size = float(np.mean(values)), len(values)
    if size == 1:
        return {"mean": mean, "ci95": None, "n": 1}
    half = float(stdtrit(size - 1, 0.5 + LEVEL / 2)) * float(np.std(values, ddof=1)) / math.sqrt(size)
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": size}


def quantile_bins(values: Sequence[float], bins: int) -> list[np.ndarray]:
    """Index groups of nearly equal size, by rising value; equal values stay together, so there may be fewer groups.

    Args:
        values: [N] numbers.
        bins: the most groups to make, at least 1.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return []
    edges = np.unique(np.quantile(array, np.linspace(0, 1, bins + 1)[1:-1]))
    labels = np.searchsorted(edges, array, side="left")
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's r; None when either side doesn't vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
