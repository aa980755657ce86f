"""Post-validation of synthetic comparisons: the heuristic filter, then agreement with the as-is reward model.

Pure functions over texts and records, so that filters can be changed and run again without generating or scoring anew.
Source: ALMoST (arXiv 2305.13735), section 2.2.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from almost_jax.config import FiltersConfig

DroppedBy: TypeAlias = Literal["empty", "identical", "keyword", "length", "as_is_reward"]


def has_bad_keyword(text: str, filters: FiltersConfig) -> bool:
    """Whether a response begins with one of `keywords_start` or contains one of `keywords_anywhere`.

    Case, the kind of apostrophe and the width of white space don't matter; quotes and other marks before the first
    word don't either. Words match whole: "well" is in "Well, no" but neither in "Wellington" nor in "well-known".
    """
    plain = _plain(text)
    if any(re.match(r"\W*" + _whole_words(keyword), plain, re.IGNORECASE) for keyword in filters.keywords_start):
        return True
    return any(re.search(_whole_words(keyword), plain, re.IGNORECASE) for keyword in filters.keywords_anywhere)


def length_floor(texts: Iterable[str]) -> float:
    """M - S / 2 of the character lengths of one query's responses, S being the population standard deviation."""
    lengths = [len(text) for text in texts]
    mean = math.fsum(lengths) / len(lengths)
    variance = math.fsum((length - mean) ** 2 for length in lengths) / len(lengths)
    return mean - math.sqrt(variance) / 2


def passes_length(chosen: str, rejected: str, floor: float) -> bool:
    """Whether the chosen response is longer than the rejected one, or longer than `length_floor`, in characters."""
    return len(chosen) > len(rejected) or len(chosen) > floor


def verdict(
    chosen: str, rejected: str, texts: Sequence[str], as_is_margin: float | None, filters: FiltersConfig
) -> DroppedBy | None:
    """The first filter, in the paper's order, that drops a pair.

    Args:
        chosen: the response of the better configuration.
        rejected: the response of the worse one.
        texts: the responses of all configurations to this query, the pair's own among them.
        as_is_margin: the as-is reward model's score of the chosen response minus that of the rejected one; None if it
            did not score them.
        filters: which filters are on, and the keywords.

    Returns:
        The filter's name, None if the pair is kept. A pair with an empty response ("empty") or with twice the same
        ("identical") says nothing about preference and is dropped whatever filters are on.

    Raises:
        ValueError: the as-is filter is on and decides, but there is no margin.
    """
    if not chosen or not rejected:
        return "empty"
    if chosen == rejected:
        return "identical"
    if filters.heuristic:
        if has_bad_keyword(chosen, filters) or has_bad_keyword(rejected, filters):
            return "keyword"
        if filters.length_rule and not passes_length(chosen, rejected, length_floor(texts)):
            return "length"
    if filters.as_is:
        if as_is_margin is None:
            raise ValueError("filters.as_is is on, but the as-is reward model did not score this pair")
        if not as_is_margin > 0:
            return "as_is_reward"
    return None


def filter_pair(pair: Mapping[str, Any], texts: Sequence[str], filters: FiltersConfig) -> dict[str, Any]:
    """A comparison record with `kept` and `dropped_by` set anew; everything else stays, `as_is_margin` too.

    Args:
        pair: {query_id, chosen {configuration, text}, rejected {...}, rule, as_is_margin}.
        texts: the responses of all configurations to the pair's query.
        filters: which filters are on, and the keywords.
    """
    dropped = verdict(pair["chosen"]["text"], pair["rejected"]["text"], texts, pair["as_is_margin"], filters)
    return {
        "query_id": pair["query_id"],
        "chosen": pair["chosen"],
        "rejected": pair["rejected"],
        "rule": pair["rule"],
        "kept": dropped is None,
        "dropped_by": dropped,
        "as_is_margin": pair["as_is_margin"],
    }


def count_verdicts(pairs: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many pairs there are, how many are kept, and how many each filter dropped."""
    counts = Counter("kept" if pair["kept"] else str(pair["dropped_by"]) for pair in pairs)
    names = ("kept", "empty", "identical", "keyword", "length", "as_is_reward")
    return {"pairs": sum(counts.values()), **{name: counts[name] for name in names}}


def _whole_words(keyword: str) -> str:
    """A pattern for a keyword as whole words, white space of any width between them."""
    words = r"\s+".join(re.escape(word) for word in _plain(keyword).split())
    return rf"(?<!\w)(?<!\w-){words}(?!\w|-\w)"


def _plain(text: str) -> str:
    """Apostrophes as a keyboard types them."""
    return text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
