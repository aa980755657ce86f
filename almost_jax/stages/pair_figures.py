"""How well a scorer ranks pairs: overall, by how sure it is, and with length taken out of the question."""

from typing import Any

import numpy as np

# Edges of |margin| in standard deviations of the score, and of |length gap| in characters, between which figures are
# given.
MARGIN_EDGES = (0.25, 0.5, 1.0, 2.0)
GAP_EDGES = (10, 25, 50, 100, 200, 400)


def pair_figures(margins: np.ndarray, gaps: np.ndarray) -> dict[str, Any]:
    """Accuracy of a scorer on pairs; a tie counts one half.

    Args:
        margins: [n] score of the chosen text minus that of the rejected one, in standard deviations.
        gaps: [n] characters of the chosen response minus those of the rejected one.

    Returns:
        held_out (n), accuracy, longer_wins_accuracy (of the scorer that prefers the longer response),
        length_matched_accuracy, mean_margin, by_margin and by_length_gap: [{from, to, n, accuracy}], None being open.
    """
    hits = 0.5 + 0.5 * np.sign(margins.astype(np.float64))
    return {
        "held_out": int(hits.size),
        "accuracy": float(hits.mean()),
        "longer_wins_accuracy": float((0.5 + 0.5 * np.sign(gaps)).mean()),
        "length_matched_accuracy": length_matched_accuracy(hits, gaps),
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
    total, weight = 0.0, 0.0
    strata = np.digitize(np.abs(gaps), GAP_EDGES)
    for stratum in np.unique(strata[gaps != 0]):
        longer, shorter = (hits[(strata == stratum) & side] for side in (gaps > 0, gaps < 0))
        matched = min(longer.size, shorter.size)
        if matched:
            total += matched * (float(longer.mean()) + float(shorter.mean()))
            weight += 2 * matched
    equal = hits[gaps == 0]
    total, weight = total + float(equal.sum()), weight + equal.size
    return total / weight if weight else None


def _binned(hits: np.ndarray, values: np.ndarray, edges: tuple[float, ...]) -> list[dict[str, Any]]:
    """Number and accuracy of the pairs between neighbouring edges, from below the first to above the last."""
    place = np.digitize(values, edges)
    bounds = [None, *edges, None]
    return [
        {"from": low, "to": high, "n": int((place == index).sum()), "accuracy": float(hits[place == index].mean())}
        for index, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        if (place == index).any()
    ]
