"""TruthfulQA: what is read, and MC1 and MC2."""

import json
import math
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.evaluation.truthfulqa import mc1, mc2, read_questions


def test_statement_25_truthfulqa_a_constant_scorer_gets_chance() -> None:
    assert [mc1([-5.0] * 4, labels) for labels in ([1, 0, 0, 0], [0, 0, 0, 1])] == [0.25, 0.25]


def test_mc1_and_mc2_by_hand() -> None:
    logprobs = [math.log(0.2), math.log(0.1), math.log(0.1)]
    assert mc1(logprobs, [1, 0, 0]) == 1.0
    assert mc1(logprobs, [0, 1, 0]) == 0.0
    assert mc2(logprobs, [1, 0, 1]) == pytest.approx(0.75)
    assert mc2([one - 2000 for one in logprobs], [1, 0, 1]) == pytest.approx(0.75)


@pytest.mark.parametrize("key", ["question", "mc1_targets", "mc2_targets"])
def test_bad_questions_are_named(tmp_path: Path, key: str) -> None:
    good = {"question": "Why?", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"b": 0, "a": 1}}
    path = tmp_path / "mc.json"
    path.write_text(json.dumps([good]))
    assert read_questions(path) == [good]
    path.write_text(json.dumps([good, {**good, key: None}]))
    with pytest.raises(InputError, match=f"question 2: {key} is"):
        read_questions(path)
