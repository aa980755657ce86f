"""Figures from records, against cases computed by hand."""

import itertools
from typing import Any

import numpy as np
import pytest

from almost_jax.evaluation import analyses
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.stages import pair_figures

BOOTSTRAP = Bootstrap(samples=200, seed=1)


def item(system: str, query: str, gold: float, **fields: Any) -> dict[str, Any]:
    base = {"query": query, "kind": "fact", "sample": 0, "text": "x", "finish": "stop"}
    scores = {"reward": 0.0, "as_is": None, "kl": None}
    return {"query_id": query, "system": system, "gold": gold} | base | scores | fields


def comparison(query: str, chosen: str, rejected: str, dropped_by: str | None) -> dict[str, Any]:
    return {
        "query_id": query,
        "chosen": {"configuration": "A", "text": chosen},
        "rejected": {"configuration": "B", "text": rejected},
        "rule": "size",
        "kept": dropped_by is None,
        "dropped_by": dropped_by,
        "as_is_margin": 0.0,
    }


def test_compare_gives_means_and_gains_in_order() -> None:
    items = [item("policy/sft", "a", 0.5), item("policy/sft", "b", 0.7), item("policy/rlsf", "a", 0.9)]
    items.append(item("policy/rlsf", "b", 1.0))
    systems = {"prompted": "policy/prompted", "sft": "policy/sft", "rlsf": "policy/rlsf"}
    means, gains = analyses.compare(items, systems, "gold", ["a", "b"], BOOTSTRAP)
    assert list(means) == ["sft", "rlsf"]  # prompted has no items
    assert means["sft"]["mean"] == pytest.approx(0.6)
    assert list(gains) == ["rlsf - sft"]
    assert gains["rlsf - sft"]["difference"] == pytest.approx(0.35)
    assert gains["rlsf - sft"]["significant"] is True


def test_pair_accuracy_by_hand_with_ties_and_cumulative_filters() -> None:
    gold = {"good": 0.9, "fair": 0.5, "also fair": 0.5, "bad": 0.1}
    comparisons = [
        comparison("a", "good", "bad", None),  # right, kept
        comparison("a", "fair", "also fair", None),  # tie, kept
        comparison("b", "bad", "good", "keyword"),  # wrong
        comparison("b", "bad", "fair", "length"),  # wrong
        comparison("c", "bad", "bad", "identical"),  # tie
        comparison("c", "fair", "good", "as_is_reward"),  # wrong, dropped by the last filter alone
    ]
    found = analyses.pair_quality(comparisons, lambda _, text: gold[text], BOOTSTRAP)
    assert found["pairs"] == {
        "raw": {"kept": 6, "accuracy": pytest.approx(2 / 6), "ties": 2},
        "heuristic": {"kept": 3, "accuracy": pytest.approx(1.5 / 3), "ties": 1},
        "as_is": {"kept": 2, "accuracy": pytest.approx(1.5 / 2), "ties": 1},
    }
    assert found["pair_gains"]["heuristic - raw"]["difference"] == pytest.approx(1.5 / 3 - 2 / 6)
    # chosen longer: "good"-"bad" yes, "fair"-"also fair" no
    assert found["pair_details"]["as_is"]["chosen_is_longer"] == pytest.approx(0.5)


def test_pairs_that_all_fall_have_no_accuracy() -> None:
    found = analyses.pair_quality([comparison("a", "xx", "x", "keyword")], lambda _, text: len(text), BOOTSTRAP)
    assert found["pairs"]["raw"] == {"kept": 1, "accuracy": 1.0, "ties": 0}
    assert found["pairs"]["heuristic"] == {"kept": 0, "accuracy": None, "ties": 0}
    assert found["pair_gains"] == {}


def test_length_matching_is_the_stages_own_and_longer_wins_gets_half() -> None:
    rng = np.random.default_rng(2)
    gaps = rng.integers(-60, 90, 300)
    hits = rng.integers(0, 2, 300).astype(float)
    rows = [(str(i), float(hit), float(gap)) for i, (hit, gap) in enumerate(zip(hits, gaps, strict=True))]
    found = analyses.length_matched(rows, [row[0] for row in rows], BOOTSTRAP)
    assert found is not None
    assert found["mean"] == pytest.approx(pair_figures.length_matched_accuracy(hits, gaps))
    longer = [(query, 0.5 + 0.5 * np.sign(gap), gap) for query, _, gap in rows]
    matched = analyses.length_matched(longer, [row[0] for row in rows], BOOTSTRAP)
    assert matched is not None and matched["mean"] == pytest.approx(0.5)
    assert analyses.length_matched([("a", 1.0, 7.0)], ["a"], BOOTSTRAP) is None


def test_reward_accuracy_by_hand() -> None:
    items = [
        item("configuration/A", "a", 0.9, text="long one", reward=2.0, as_is=0.0),
        item("configuration/B", "a", 0.4, text="mid", reward=1.0, as_is=0.0),
        item("configuration/C", "a", 0.4, text="y", reward=3.0, as_is=1.0),
        item("configuration/A", "b", 0.2, text="short", reward=-1.0, as_is=5.0),
        item("configuration/B", "b", 0.8, text="longer!", reward=0.5, as_is=6.0),
    ]
    found = analyses.reward_accuracy(items, ["a", "b"], BOOTSTRAP)
    # Pairs: a: A>B right, A>C wrong, (B, C) tie of gold and no pair; b: B>A right.
    assert found["reward_model"]["accuracy"] == pytest.approx(2 / 3)
    assert found["reward_model"]["longer_wins_accuracy"] == 1.0
    assert found["reward_model"]["as_is_accuracy"] == pytest.approx((0.5 + 0 + 1) / 3)  # a tie, wrong, right
    assert found["reward_model"]["length_matched_accuracy"] is None  # no better response is the shorter one
    gain = found["reward_model_gains"]["accuracy - longer_wins_accuracy"]
    assert gain["difference"] == pytest.approx(-1 / 3)


def test_reward_accuracy_does_not_depend_on_the_order_of_responses() -> None:
    rng = np.random.default_rng(7)
    items = [
        item(f"configuration/{name}", str(query), float(rng.integers(3)), reward=0.0, text="x" * int(rng.integers(9)))
        for query in range(20)
        for name in "ABCD"
    ]
    queries = [str(query) for query in range(20)]
    forward = analyses.reward_accuracy(items, queries, BOOTSTRAP)["reward_model"]
    backward = analyses.reward_accuracy(items[::-1], queries, BOOTSTRAP)["reward_model"]
    assert forward == pytest.approx(backward)
    assert forward["accuracy"] == 0.5  # a constant scorer gets chance
    assert forward["as_is_accuracy"] is None  # no as-is scores were taken


def test_ablation_by_hand() -> None:
    def pair(query: str, chosen: str, rejected: str, sets: str, raw: float, kept: float) -> dict[str, Any]:
        names = ["raw", "heuristic"][: len(sets)]
        return {"query_id": query, "chosen": chosen, "rejected": rejected, "sets": names} | {
            "margins": {"raw": raw, "heuristic": kept}
        }

    records = [
        pair("a", "long", "x", "rh", 1.0, 2.0),
        pair("a", "x", "long", "rh", 1.0, -2.0),
        pair("b", "same", "else", "r", -1.0, 0.0),
        pair("c", "longer", "x", "r", -3.0, 1.0),
    ]
    found = analyses.ablation_figures(records, lambda record: 1.0, BOOTSTRAP)
    assert list(found) == ["raw", "heuristic"]
    means = {name: {model: one["mean"] for model, one in of["accuracy"].items()} for name, of in found.items()}
    assert means == {"raw": {"raw": 0.5, "heuristic": 0.625}, "heuristic": {"raw": 1.0, "heuristic": 0.5}}
    assert found["raw"]["longer_wins"]["mean"] == 0.625 and found["raw"]["longer_wins"]["n"] == 4
    assert found["raw"]["gains"]["heuristic - raw"]["difference"] == pytest.approx(0.125)
    # Of two pairs of like gap, one either way round, the one whose longer response was chosen is right.
    assert found["heuristic"]["length_matched"]["heuristic"]["mean"] == pytest.approx(0.5)
    # By another truth: the first pair is undecided, the second's rejected response is the better one.
    truth = {("a", "long"): 0.0, ("a", "x"): -1.0, ("b", "same"): 1.0, ("c", "longer"): 1.0}
    other = analyses.ablation_figures(records, lambda record: truth[record["query_id"], record["chosen"]], BOOTSTRAP)
    assert other["raw"]["accuracy"]["heuristic"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert other["raw"]["longer_wins"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert other["raw"]["accuracy"]["raw"]["n"] == 3 and other["heuristic"]["accuracy"]["raw"]["mean"] == 0.0
    assert analyses.ablation_figures([], truth.__getitem__, BOOTSTRAP) == {}


def test_11_best_of_n_by_hand_with_ties_to_the_text_that_sorts_first() -> None:
    rewards, golds, texts = [0.3, 0.9, 0.9, -1.0], [0.1, 0.6, 0.2, 1.0], ["w", "z", "y", "x"]
    items = [
        item("best_of_n", "a", gold, reward=reward, sample=index, text=text)
        for index, (reward, gold, text) in enumerate(zip(rewards, golds, texts, strict=True))
    ]
    expected = {"1": 0.1, "4": 0.2, "oracle_4": 1.0}
    for order in itertools.permutations(items):
        assert [found["text"] for found in analyses._choices(order)] == ["y"]
    assert analyses.best_of_n(items, 4, ["a"], BOOTSTRAP)["best_of_n"] == expected
    assert analyses.best_of_n(items[::-1], 4, ["a"], BOOTSTRAP)["best_of_n"] == expected


def test_demonstrations_are_judged_turn_by_turn_within_the_world() -> None:
    def dialogue(query: str, *texts: str) -> dict[str, Any]:
        roles = ("human", "assistant") * 2
        return {"query_id": query, "turns": [{"role": r, "text": t} for r, t in zip(roles, texts, strict=False)]}

    sources = {
        "self_play": [dialogue("a", "q1", "bad", "gibberish", "good"), dialogue("b", "q2", "good")],
        "reward_guided": [dialogue("a", "q1", "good", "q2", "bad"), dialogue("b", "q2", "good")],
    }
    score = {("q1", "bad"): 0.0, ("q1", "good"): 1.0, ("q2", "good"): 0.8, ("q2", "bad"): 0.2}
    found = analyses.demonstration_quality(
        sources, lambda query, text: score[query, text], lambda query: query != "gibberish", BOOTSTRAP
    )
    plain, guided = found["demonstrations"]["self_play"], found["demonstrations"]["reward_guided"]
    assert (plain["mean"], plain["n"], plain["unscored"]) == (pytest.approx(0.4), 2, 1)
    assert (guided["mean"], guided["n"], guided["unscored"]) == (pytest.approx(2 / 3), 3, 0)
    gain = found["demonstration_gains"]["reward_guided - self_play"]
    assert gain["difference"] == pytest.approx(2 / 3 - 0.4)


def test_curve_is_in_order_of_steps() -> None:
    items = [
        item(f"curve/{step}", query, gold, reward=reward, kl=kl, text="four")
        for step, kl, reward, gold in ((100, 3.0, 2.0, 0.4), (0, 0.0, 0.5, 0.6), (20, 1.0, 1.0, 0.8))
        for query in "ab"
    ]
    curve = analyses.over_optimisation(items, ("kl", "reward", "gold"), ["a", "b"], BOOTSTRAP)
    assert [(point["step"], point["kl"], point["reward"], point["gold"]) for point in curve] == [
        (0, 0.0, 0.5, 0.6),
        (20, 1.0, 1.0, 0.8),
        (100, 3.0, 2.0, 0.4),
    ]
    assert curve[0]["characters"] == 4 and curve[0]["n"] == 2
    assert analyses.selected(curve) == {"reward": 100, "gold": 20}
    assert analyses.over_optimisation(items, ("kl", "reward"), ["a", "b"], BOOTSTRAP, "over_optimised") == []


def test_kinds_lengths_and_bins() -> None:
    items = [
        item("policy/sft", "a", 0.2, text="x" * 3, reward=1.0, finish="length"),
        item("policy/sft", "b", 0.4, text="x" * 9, reward=3.0),
        item("policy/sft", "c", 0.9, text="x" * 6, reward=2.0, kind="harmful"),
    ]
    assert analyses.by_kind(items) == {
        "policy/sft": {"fact": {"mean": pytest.approx(0.3), "n": 2}, "harmful": {"mean": 0.9, "n": 1}}
    }
    lengths = analyses.response_lengths(items)["policy/sft"]
    assert lengths == {"characters": 6.0, "unfinished": pytest.approx(1 / 3)}
    found = analyses.by_length(items)
    assert [(group["characters"], group["reward"]) for group in found["bins"]] == [(3, 1), (6, 2), (9, 3)]
    assert found["correlation"]["reward"] == pytest.approx(1)
    assert "as_is" not in found["bins"][0]
