"""How well a scorer ranks pairs: overall, by how sure it is, and with length taken out of the question."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Edges of |margin| in standard deviations of the score, and of |length gap| in characters, between which figures are
# given.
MARGIN_EDGES = (0.25, 0.5, 1.0, 2.0)
GAP_EDGES = (10, 25, 50, 100, 200, 400)
# The quantile of the normal distribution that bounds a 95% interval.
NORMAL_95 = 1.96
# Rank correlation with length from which on a scorer counts as following it.
FOLLOWS_LENGTH = 0.5


def pair_figures(margins: np.ndarray, gaps: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Accuracy of a scorer on pairs; a tie counts one half.

    Args:
        margins: [n] score of the chosen text minus that of the rejected one, in standard deviations.
        gaps: [n] characters of the chosen response minus those of the rejected one.
        groups: [n] what each pair is about; pairs of one group are not independent.

    Returns:
        held_out (n), accuracy, longer_wins_accuracy (of the scorer that prefers the longer response),
        length_matched_accuracy and its 95% interval length_matched_ci95, length_correlation, length_only (see
        `learned_length_alone`), mean_margin, by_margin and by_length_gap: [{from, to, n, accuracy}], None being open.
    """
    hits = 0.5 + 0.5 * np.sign(margins.astype(np.float64))
    matched = length_matched_accuracy(hits, gaps)
    bounds = length_matched_interval(hits, gaps, groups)
    follows = length_correlation(margins, gaps)
    return {
        "held_out": int(hits.size),
        "accuracy": float(hits.mean()),
        "longer_wins_accuracy": float((0.5 + 0.5 * np.sign(gaps)).mean()),
        "length_matched_accuracy": matched,
        "length_matched_ci95": bounds,
        "length_correlation": follows,
        "length_only": learned_length_alone(follows, bounds),
        "mean_margin": float(margins.astype(np.float64).mean()),
        "by_margin": _binned(hits, np.abs(margins), (0.0, *MARGIN_EDGES)),
        "by_length_gap": _binned(hits, gaps, (*(-edge for edge in reversed(GAP_EDGES)), 0, *GAP_EDGES)),
    }


def length_matched_accuracy(hits: np.ndarray, gaps: np.ndarray) -> float | None:
    """Accuracy where length says nothing: among pairs of like |gap|, chosen-longer and chosen-shorter weigh the same.

    Args:
        hits: [n] 1 where the scorer is right, 0.5 at a tie, 0 where wrong.
        gaps: [n] characters, chosen minus rejected.

    Returns:
        The mean over strata of |gap| (edges `GAP_EDGES`) of the mean of the two sides' accuracies, each stratum
        weighted by its smaller side; pairs of equal length form a stratum of their own, as they are. "The longer one
        wins" gets exactly one half. None when nothing can be matched.
    """
    weights = matching_weights(gaps)
    return float(weights @ hits / weights.sum()) if weights.any() else None


def matching_weights(gaps: np.ndarray) -> np.ndarray:
    """What each pair weighs in `length_matched_accuracy`: [n] characters -> [n], 0 where it can't be matched."""
    strata = np.digitize(np.abs(gaps), GAP_EDGES)
    weights = np.where(gaps == 0, 1.0, 0.0)
    for stratum in np.unique(strata[gaps != 0]):
        sides = [(strata == stratum) & (gaps > 0), (strata == stratum) & (gaps < 0)]
        matched = min(int(side.sum()) for side in sides)
        for side in sides:
            weights[side] = matched / max(int(side.sum()), 1)
    return weights


def length_matched_interval(hits: np.ndarray, gaps: np.ndarray, groups: Sequence[str]) -> list[float] | None:
    """The 95% interval of `length_matched_accuracy`, by the normal approximation.

    The variance is that between groups (pairs of one query share texts), and never less than that of fair coins, so
    that a handful of pairs that all happen to be right shows nothing.

    Args:
        hits, gaps: as there.
        groups: [n] names.

    Returns:
        [low, high], clipped to 0..1; None when nothing can be matched.
    """
    weights = matching_weights(gaps)
    whole = weights.sum()
    if not whole:
        return None
    mean = weights @ hits / whole
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    between = np.square(np.bincount(place, weights * (hits - mean))).sum()
    coins = 0.25 * np.square(weights).sum()
    spread = NORMAL_95 * float(np.sqrt(max(between, coins))) / whole
    return [float(max(mean - spread, 0.0)), float(min(mean + spread, 1.0))]


def length_correlation(margins: np.ndarray, gaps: np.ndarray) -> float:
    """Spearman's rank correlation of score differences with length differences, within pairs.

    Every pair is counted in both directions, so that it makes no difference which of its texts is called chosen: a
    scorer is not blamed for preferring texts that happen to be the longer ones, only for ordering differences by
    length. What both texts answer to is the same and drops out.

    Args:
        margins: [n] score differences.
        gaps: [n] differences in characters.

    Returns:
        -1 to 1; 0 when one of the two never differs.
    """
    left, right = (_ranks(np.concatenate([x, -x])) for x in (margins.astype(np.float64), gaps.astype(np.float64)))
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on, equal values sharing the mean of theirs; scipy.stats has it, and takes a second to import."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def learned_length_alone(correlation: float, matched: Sequence[float] | None) -> bool:
    """Whether scores follow length, and nothing shows that they follow anything else.

    Args:
        correlation: see `length_correlation`.
        matched: the interval of the length-matched accuracy; None when nothing could be matched, so nothing shows it.
    """
    return correlation >= FOLLOWS_LENGTH and (matched is None or matched[0] <= 0.5)


def logged_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """`pair_figures` as flat numbers for metrics.jsonl, under `held_out_...`; what is None is left out.

    Buckets are named by their edges, as in `held_out_accuracy/length_gap_-25_-10`; "open" is no edge.
    """
    found: dict[str, float] = {}
    for name, value in figures.items():
        if name in ("by_margin", "by_length_gap"):
            for bucket in value:
                low, high = ("open" if edge is None else f"{edge:g}" for edge in (bucket["from"], bucket["to"]))
                found[f"held_out_accuracy/{name.removeprefix('by_')}_{low}_{high}"] = bucket["accuracy"]
        elif name == "length_matched_ci95":
            if value is not None:
                found["held_out_length_matched_low"], found["held_out_length_matched_high"] = value
        elif name != "held_out" and value is not None:
            found[f"held_out_{name}"] = float(value)
    return found


def _binned(hits: np.ndarray, values: np.ndarray, edges: tuple[float, ...]) -> list[dict[str, Any]]:
    """Number and accuracy of the pairs between neighbouring edges, from below the first to above the last."""
    place = np.digitize(values, edges)
    bounds = [None, *edges, None]
    return [
        {"from": low, "to": high, "n": int((place == index).sum()), "accuracy": float(hits[place == index].mean())}
        for index, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        if (place == index).any()
    ]
