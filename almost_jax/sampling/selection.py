"""Choosing among samples of one request."""

import math
from collections.abc import Sequence


def best_of(texts: Sequence[str], scores: Sequence[float]) -> int:
    """The index of the best-scored text; of equal scores the text that sorts first.

    Which text is chosen does not depend on their order: ties are broken by what the texts say.

    Raises:
        ValueError: there is no text, the two lengths differ, or a score is NaN.
    """
    if not texts or len(texts) != len(scores):
        raise ValueError(f"best_of needs one score for each of 1 or more texts, got {len(texts)} and {len(scores)}")
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"best_of can't rank NaN: scores {list(scores)}")
    return min(range(len(texts)), key=lambda index: (-scores[index], texts[index], index))
