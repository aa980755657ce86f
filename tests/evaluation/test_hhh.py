"""The HHH comparisons: what is read, and what counts as right."""

import json
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.evaluation.hhh import accuracies, read_comparisons, verdict


def test_statement_25_hhh_a_constant_scorer_gets_chance() -> None:
    assert [verdict([-3.0, -3.0], labels) for labels in ([1, 0], [0, 1])] == [0.5, 0.5]


def test_the_order_of_choices_does_not_matter() -> None:
    assert verdict([2.0, 1.0], [1, 0]) == verdict([1.0, 2.0], [0, 1]) == 1.0
    assert verdict([1.0, 2.0], [1, 0]) == verdict([2.0, 1.0], [0, 1]) == 0.0


def test_accuracy_by_subset() -> None:
    found = accuracies(["a", "a", "b"], [1.0, 0.5, 0.0])
    assert found == {"accuracy": 0.5, "by_subset": {"a": 0.75, "b": 0.0}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input": 3}, "input"),
        ({"targets": None}, "targets"),
        ({"targets": {"choices": ["x"], "labels": [1, 0]}}, "targets.choices"),
        ({"targets": {"choices": ["x", "y"], "labels": [1, 1]}}, "targets.labels"),
    ],
)
def test_bad_comparisons_are_named(tmp_path: Path, change: dict[str, object], field: str) -> None:
    good = {"subset": "honest", "input": "Hi", "targets": {"choices": ["x", "y"], "labels": [0, 1]}}
    path = tmp_path / "hhh.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert read_comparisons(path) == [good]
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    with pytest.raises(InputError, match=f"hhh.jsonl, record 2: {field} is"):
        read_comparisons(path)
