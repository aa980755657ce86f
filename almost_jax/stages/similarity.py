"""ROUGE-L against a growing pool, exact and fast enough to compare thousands of queries with each other.

Scores equal those of the rouge-score package (`RougeScorer(["rougeL"], use_stemmer=False)`, F-measure): lower case,
tokens are runs of a-z and 0-9. Source: Lin, ROUGE (2004); its use against near-duplicates: Wang et al., Self-Instruct
(2023).
"""

import re
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Bounds that fall short of the threshold by less than rounding can explain are still checked exactly.
_SLACK = 1e-9


def rouge_tokens(text: str) -> list[str]:
    """The tokens that the rouge-score package compares: runs of a-z and 0-9 after lowering the case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table at once in the bits of one integer.

    Source: Hyyro, Bit-parallel LCS-length computation revisited (2004).
    """
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L F-measure of two lists of tokens, in [0, 1]; 0 if either is empty."""
    if not first or not second:
        return 0.0
    length = longest_common_subsequence(first, second)
    if length == 0:
        return 0.0
    precision, recall = length / len(second), length / len(first)
    return 2 * precision * recall / (precision + recall)


class SimilarityPool:
    """Texts, and which of them a new text is too similar to.

    An index from the k-th occurrence of a token to the texts that have it gives, in one pass, the number of tokens that
    a new text shares with each old one. As a common subsequence can't be longer, 2 * shared / (m + n) bounds ROUGE-L
    from above, and only texts whose bound exceeds the threshold are compared.
    """

    def __init__(self) -> None:
        """An empty pool."""
        self._tokens: list[list[str]] = []
        self._lengths = array("q")
        self._holders: dict[tuple[str, int], array[int]] = {}

    def add(self, text: str) -> None:
        """Put a text into the pool."""
        tokens = rouge_tokens(text)
        for occurrence in _occurrences(tokens):
            self._holders.setdefault(occurrence, array("q")).append(len(self._tokens))
        self._tokens.append(tokens)
        self._lengths.append(len(tokens))

    def most_similar(self, text: str, threshold: float) -> tuple[int, float] | None:
        """The text of the pool with the highest ROUGE-L, if that exceeds the threshold.

        Returns:
            Its place in order of addition (the first of equals) and the ROUGE-L, or None.
        """
        tokens = rouge_tokens(text)
        if not tokens or not self._tokens:
            return None
        shared = np.zeros(len(self._tokens), np.int64)
        for occurrence in _occurrences(tokens):
            if occurrence in self._holders:
                shared[np.frombuffer(self._holders[occurrence], np.int64)] += 1
        bounds = 2 * shared / (np.frombuffer(self._lengths, np.int64) + len(tokens))
        best: tuple[int, float] | None = None
        for index in np.flatnonzero(bounds > threshold - _SLACK).tolist():
            score = rouge_l(self._tokens[index], tokens)
            if score > (threshold if best is None else best[1]):
                best = index, score
        return best


def _occurrences(tokens: Sequence[str]) -> list[tuple[str, int]]:
    """(token, 1) for its first occurrence, (token, 2) for its second, and so on."""
    return [(token, k) for token, count in Counter(tokens).items() for k in range(1, count + 1)]
