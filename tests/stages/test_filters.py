import copy
import os
from pathlib import Path
from typing import Any

import pytest

from almost_jax.config import FiltersConfig
from almost_jax.io.records import read_records
from almost_jax.stages.filters import (
    count_verdicts,
    filter_pair,
    has_bad_keyword,
    length_floor,
    passes_length,
    verdict,
)

FILTERS = FiltersConfig(keywords_start=("well",), keywords_anywhere=("i don't know", "as an ai"))
# Mean 5, population standard deviation exactly 2 (the sample's would be 2.14): the floor is 5 - 2 / 2 = 4.
LENGTHS = [2, 4, 4, 4, 5, 5, 7, 9]


def texts(letter: str = "a") -> list[str]:
    return [letter * length for length in LENGTHS]


def test_26_length_rule_by_hand():
    assert length_floor(texts()) == 4.0
    # Longer than the rejected one, though below the floor.
    assert passes_length("aaa", "aa", 4.0)
    # Not longer than the rejected one; above the floor.
    assert passes_length("aaaaa", "aaaaaaa", 4.0)
    assert passes_length("aaaaa", "bbbbb", 4.0)
    # Exactly at the floor is not above it; the sample's standard deviation (floor 3.93) would keep this pair.
    assert not passes_length("aaaa", "aaaaa", 4.0)
    assert not passes_length("aaaa", "bbbb", 4.0)
    assert verdict("aaaa", "bbbbb", texts(), 1.0, FILTERS) == "length"
    assert verdict("aaaaa", "bbbbbbb", texts(), 1.0, FILTERS) is None


def test_26_lengths_are_in_characters_not_bytes_or_words():
    assert length_floor(texts("\N{LATIN SMALL LETTER E WITH ACUTE}")) == 4.0
    # 4 characters, but 7 bytes, and more words than the rejected one.
    assert verdict("\u00e9 \u00e9\u00e9", "bbbbb", texts(), 1.0, FILTERS) == "length"


def test_26_floor_of_equal_lengths_is_their_length():
    assert length_floor(["aaa", "bbb", "ccc"]) == 3.0
    assert verdict("aaa", "bbb", ["aaa", "bbb", "ccc"], 1.0, FILTERS) == "length"


@pytest.mark.parametrize(
    "text",
    [
        "Well, it depends.",
        "well it depends",
        "  WELL... no",
        '"Well," he said.',
        "I don't know.",
        "Hm, but I DON'T  know that",
        "I don\N{RIGHT SINGLE QUOTATION MARK}t know",
        "I said i don't\nknow!",
        "As an AI, I can't.",
        "Sorry: as an ai.",
    ],
)
def test_26_keywords_at_the_start_and_inside(text: str):
    assert has_bad_keyword(text, FILTERS)


@pytest.mark.parametrize(
    "text",
    [
        "It went well, thank you.",
        "Wellington is a capital.",
        "Well-known is the tale.",
        "I don't knowingly lie.",
        "I do know.",
        "has an aim",
        "",
    ],
)
def test_26_keywords_match_whole_words_in_their_place_only(text: str):
    assert not has_bad_keyword(text, FILTERS)


def test_26_a_keyword_in_either_response_drops_the_pair():
    good, bad = "A good long answer.", "Well, no."
    assert verdict(good, bad, [good, bad], 1.0, FILTERS) == "keyword"
    assert verdict(bad, good, [good, bad], 1.0, FILTERS) == "keyword"


def test_filters_work_in_the_papers_order():
    short, long = "aaaa", "bbbbb"
    keyworded = "well"
    assert verdict(keyworded, long, texts(), -1.0, FILTERS) == "keyword"
    assert verdict(short, long, texts(), -1.0, FILTERS) == "length"
    assert verdict(long, short, texts(), -1.0, FILTERS) == "as_is_reward"
    assert verdict(long, short, texts(), 0.0, FILTERS) == "as_is_reward"
    assert verdict(long, short, texts(), 1e-6, FILTERS) is None


def test_each_filter_can_be_turned_off():
    def off(**keys: Any) -> FiltersConfig:
        return FILTERS.model_copy(update=keys)

    assert verdict("aaaa", "bbbbb", texts(), 1.0, off(length_rule=False)) is None
    assert verdict("well", "bbbbb", texts(), 1.0, off(length_rule=False)) == "keyword"
    assert verdict("well", "bbbbb", texts(), 1.0, off(heuristic=False)) is None
    assert verdict("well", "bbbbb", texts(), -1.0, off(heuristic=False, as_is=False)) is None
    assert verdict("bbbbb", "aaaa", texts(), None, off(as_is=False)) is None
    with pytest.raises(ValueError, match="did not score"):
        verdict("bbbbb", "aaaa", texts(), None, FILTERS)


def test_empty_and_identical_responses_are_dropped_whatever_is_on():
    nothing = FiltersConfig(heuristic=False, as_is=False)
    for filters in (FILTERS, nothing):
        assert verdict("", "aaaa", texts(), None, filters) == "empty"
        assert verdict("aaaa", "", texts(), None, filters) == "empty"
        assert verdict("well", "well", texts(), 0.0, filters) == "identical"


def pair(chosen: str, rejected: str, margin: float | None) -> dict[str, Any]:
    return {
        "query_id": "q",
        "chosen": {"configuration": "A", "text": chosen},
        "rejected": {"configuration": "B", "text": rejected},
        "rule": "size",
        "as_is_margin": margin,
    }


def test_filtering_again_equals_filtering_anew_and_changes_no_input():
    pairs = [pair("aaaa", "bbbbb", 1.0), pair("bbbbb", "aaaa", -2.5), pair("bbbbb", "aa", 0.5), pair("", "a", None)]
    before = copy.deepcopy(pairs)
    loose = FILTERS.model_copy(update={"length_rule": False})
    strict = [filter_pair(record, texts(), FILTERS) for record in pairs]
    again = [filter_pair(record, texts(), loose) for record in strict]
    assert pairs == before
    assert again == [filter_pair(record, texts(), loose) for record in pairs]
    assert [record["dropped_by"] for record in strict] == ["length", "as_is_reward", None, "empty"]
    assert [record["dropped_by"] for record in again] == [None, "as_is_reward", None, "empty"]
    assert [record["as_is_margin"] for record in again] == [1.0, -2.5, 0.5, None]
    assert list(strict[0]) == ["query_id", "chosen", "rejected", "rule", "kept", "dropped_by", "as_is_margin"]
    assert count_verdicts(strict) == {
        "pairs": 4,
        "kept": 1,
        "empty": 1,
        "identical": 0,
        "keyword": 0,
        "length": 1,
        "as_is_reward": 1,
    }


ANSWERS = Path(os.environ.get("ALMOST_JAX_DATA", Path(__file__).parents[2] / "shared" / "data")) / "vicuna_bench"


@pytest.mark.skipif(not ANSWERS.exists(), reason="needs the recorded answers to the Vicuna questions")
def test_a_vanilla_models_answers_are_rejected_for_reasons_that_a_reader_shares():
    """LLaMA-13B's answers, ranked below Alpaca's and Vicuna's as a larger model would be above."""
    answers = {
        name: {line["question_id"]: line["text"] for line in read_records(ANSWERS / f"answers_{name}-13b.jsonl")}
        for name in ("vicuna", "alpaca", "llama")
    }
    filters = FiltersConfig(as_is=False)
    dropped: dict[str | None, list[int]] = {}
    for question, llama in answers["llama"].items():
        texts = [answers[name][question] for name in ("vicuna", "alpaca", "llama")]
        dropped.setdefault(verdict(texts[1], llama, texts, None, filters), []).append(question)
        # Vicuna writes at length: against it only what says nothing goes, and an answer that never ends.
        assert (verdict(texts[0], llama, texts, None, filters) is None) == (question not in (54, 74, 79))
    assert dropped["empty"] == [74] and not answers["llama"][74].strip()
    assert dropped["keyword"] == [54] and answers["llama"][54].startswith("I'm not sure.")
    assert len(dropped["length"]) == 37
    for question in dropped["length"]:
        # What Alpaca answered in these is shorter than the vanilla answer, and short among the three.
        assert len(answers["alpaca"][question]) < len(answers["llama"][question])
