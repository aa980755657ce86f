"""Figures without a gold score, against cases computed by hand."""

from typing import Any

import numpy as np
import pytest

from almost_jax.evaluation import scores
from almost_jax.evaluation.statistics import Bootstrap, paired_intercept

BOOTSTRAP = Bootstrap(samples=200, seed=1)


def item(system: str, query: str, text: str, reward: float, **fields: Any) -> dict[str, Any]:
    base = {"sample": 0, "finish": "stop", "gold": None, "as_is": None, "kl": None, "kind": None}
    return {"query_id": query, "query": query, "system": system, "text": text, "reward": reward} | base | fields


def test_the_intercept_is_what_a_line_through_length_leaves() -> None:
    lengths = [-3.0, 1.0, 2.0, 7.0, 11.0]
    found = paired_intercept([2.0 + 0.5 * length for length in lengths], lengths, BOOTSTRAP)
    assert found is not None
    assert found["difference"] == pytest.approx(2.0)
    assert found["ci95"] == pytest.approx([2.0, 2.0])
    assert found["significant"] is True and found["n"] == 5
    # All of a gain may be length.
    assert paired_intercept([0.5 * length for length in lengths], lengths, BOOTSTRAP)["difference"] == pytest.approx(0)  # type: ignore[index]
    # Length that does not vary explains nothing, and two points make no line.
    assert paired_intercept([1.0, 2.0, 6.0], [4.0, 4.0, 4.0], BOOTSTRAP)["difference"] == pytest.approx(3.0)  # type: ignore[index]
    assert paired_intercept([1.0, 2.0], [4.0, 5.0], BOOTSTRAP) is None


def test_rungs_count_agreement_ties_and_length_by_hand() -> None:
    items = [
        item("configuration/A", "q", "long answer", 2.0),
        item("configuration/B", "q", "short", 1.0),  # right, longer
        item("configuration/A", "r", "x", 0.5),
        item("configuration/B", "r", "longer", 0.5),  # a tie, shorter
        item("configuration/A", "s", "same", -1.0),
        item("configuration/B", "s", "size", 3.0),  # wrong, equally long
        item("configuration/C", "s", "alone", 9.0),  # C answers one query, worse than B there
    ]
    found = scores.rungs(items, ["A", "B", "C", "D"], ["reward"], ["q", "r", "s"], BOOTSTRAP)
    assert list(found) == ["A over B", "B over C"]  # nobody has answered as D
    assert found["A over B"]["longer"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["A over B"]["reward"]["mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["A over B"]["reward"]["n"] == 3
    assert found["B over C"]["reward"]["mean"] == 0.0
    # Matched by length: one pair on either side counts 1 and 0.5, the equally long one 0.
    assert found["A over B"]["reward"]["length_matched"]["mean"] == pytest.approx(0.5)


def test_the_choice_of_n_is_the_reward_models_and_ties_go_to_the_earlier() -> None:
    items = [
        item("best_of_n", "q", "a", 0.0, sample=0, as_is=5.0),
        item("best_of_n", "q", "bb", 2.0, sample=1, as_is=1.0),
        item("best_of_n", "q", "c", 2.0, sample=2, as_is=9.0),
        item("best_of_n", "r", "dddd", 1.0, sample=1, as_is=0.0),
        item("best_of_n", "r", "e", -1.0, sample=0, as_is=4.0),
    ]
    found = scores.choice_of_n(items, 3, ["reward", "as_is"], ["q", "r"], BOOTSTRAP)
    assert found["1"]["reward"]["mean"] == pytest.approx((0.0 - 1.0) / 2)
    assert found["3"]["reward"]["mean"] == pytest.approx((2.0 + 1.0) / 2)
    assert found["3"]["as_is"]["mean"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["3"]["characters"] == 3.0
    assert found["gains"]["3 - 1"]["as_is"]["difference"] == pytest.approx(0.5 - 4.5)


def test_every_step_is_compared_with_the_one_before_it_also_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    queries = [f"q{number}" for number in range(12)]
    items, played = [], []
    for query in queries:
        for place, name in enumerate(("A", "B")):
            items.append(item(f"configuration/{name}", query, "x" * int(rng.integers(5, 50)), float(-place)))
        for name, bonus in (("prompted", 0.0), ("sft", 1.0), ("rlsf", 1.0)):
            length = int(rng.integers(5, 90)) + (30 if name == "rlsf" else 0)
            # The reward is length alone, but for a point that both trained policies have.
            items.append(item(f"policy/{name}", query, "x" * length, 0.1 * length + bonus))
        for source in ("self_play", "reward_guided"):
            played.append(item(source, query, "y" * int(rng.integers(5, 50)), float(source == "reward_guided")))
    found = scores.analyse(items, played, ["A", "B"], 1, queries, BOOTSTRAP)
    assert found["measures"] == ["reward"]
    assert list(found["configurations"]) == ["A", "B"] and list(found["gaps"]) == ["A - B"]
    assert found["gaps"]["A - B"]["reward"]["difference"] == 1.0
    assert list(found["steps"]) == ["sft - prompted", "rlsf - sft"]
    level = {name: gain["reward"]["at_equal_length"]["difference"] for name, gain in found["steps"].items()}
    assert level == {"sft - prompted": pytest.approx(1.0), "rlsf - sft": pytest.approx(0.0, abs=1e-9)}
    assert found["steps"]["rlsf - sft"]["reward"]["difference"] > 1
    assert found["demonstration_gains"]["reward_guided - self_play"]["reward"]["difference"] == 1.0
    assert set(found["by_length"]) == {"configurations", "policies", "demonstrations"}
    assert found["by_length"]["policies"]["correlation"]["reward"] > 0.9
    assert found["rlsf_curve"] == []
