"""The table over several runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from almost_jax.report.sweep import of_gold, summarise, write_sweep
from almost_jax.report.tables import claims, figures

Make = Callable[[int], Path]


def test_figures_and_claims_over_points(make_finished_run: Make, tmp_path: Path) -> None:
    points = [(f"seed={seed}", make_finished_run(seed)) for seed in (3, 4, 5)]
    text = write_sweep(tmp_path, [*points, ("seed=6", tmp_path / "unfinished")])
    golds = {label: json.loads((folder / "evaluation" / "gold.json").read_text()) for label, folder in points}
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert result["points"] == ["seed=3", "seed=4", "seed=5"]
    assert result["missing"] == ["seed=6"]
    values = [figures(gold)["policy, RLSF"] for gold in golds.values()]
    found = result["figures"]["policy, RLSF"]
    assert list(found["values"].values()) == values
    half = 4.302653 * np.std(values, ddof=1) / 3**0.5
    assert found["ci95"] == pytest.approx([np.mean(values) - half, np.mean(values) + half], rel=1e-5)
    verdicts = [claim.verdict for gold in golds.values() for claim in claims(gold) if claim.text == "A beats B"]
    row = result["claims"]["A beats B"]
    assert (row["holds"], row["n"], row["positive"]) == (verdicts.count("holds"), 3, 3)
    assert row["holds"] + row["within_noise"] + row["fails"] == 3
    assert "seed=6" in text
    assert "A beats B" in (tmp_path / "sweep.md").read_text()
    html = (tmp_path / "sweep.html").read_text()
    assert "A beats B" in html and "<script" not in html


def test_counts_of_claims_by_hand(make_finished_run: Make) -> None:
    gold = json.loads((make_finished_run(3) / "evaluation" / "gold.json").read_text())
    worse = json.loads(json.dumps(gold))
    worse["steps"]["rlsf - sft"] |= {"difference": -0.2, "ci95": [-0.3, -0.1]}
    unsure = json.loads(json.dumps(gold))
    unsure["steps"]["rlsf - sft"] |= {"difference": 0.05, "ci95": [-0.1, 0.2]}
    outcomes = {label: of_gold(one) for label, one in (("a", gold), ("b", worse), ("c", unsure))}
    row = summarise(outcomes)["claims"]["RLSF beats SFT on guided self-play"]
    assert (row["holds"], row["within_noise"], row["fails"], row["positive"]) == (1, 1, 1, 2)


def test_one_point_has_no_interval_and_none_has_no_table(make_finished_run: Make, tmp_path: Path) -> None:
    text = write_sweep(tmp_path, [("only", make_finished_run(3))])
    assert "no intervals over runs" in text
    assert json.loads((tmp_path / "sweep.json").read_text())["figures"]["policy, RLSF"]["ci95"] is None
    assert "left out: x" in write_sweep(tmp_path, [("x", tmp_path / "nothing")])


def test_hostile_labels_are_shown_as_text(make_finished_run: Make, tmp_path: Path) -> None:
    label = "<script>alert(1)</script>\x1b[31m|"
    text = write_sweep(tmp_path, [(label, make_finished_run(3)), ("<b>missing\x07", tmp_path / "nothing")])
    assert "\x1b" not in text and "\x07" not in text
    for name in ("sweep.html", "sweep.md"):
        content = (tmp_path / name).read_text()
        assert "<script" not in content and "<b>missing" not in content and "\x1b" not in content


def test_runs_without_a_gold_score_are_judged_by_their_reward_models(scored_run: Path, tmp_path: Path) -> None:
    points = [("first", scored_run), ("second", scored_run), ("third", tmp_path / "nothing")]
    text = write_sweep(tmp_path, points)
    result = json.loads((tmp_path / "sweep.json").read_text())
    scores = json.loads((scored_run / "evaluation" / "scores.json").read_text())
    assert result["points"] == result["by_reward_models"] == ["first", "second"] and result["missing"] == ["third"]
    found = result["figures"]
    assert found["policy, RLSF, by the reward model"]["mean"] == pytest.approx(
        scores["policies"]["rlsf"]["reward"]["mean"]
    )
    assert found["policy, RLSF, characters"]["n"] == 2
    assert found["accuracy on held-out pairs, reward model, length-matched"]["mean"] == pytest.approx(0.5644)
    gain = scores["steps"]["rlsf - sft"]["as_is"]
    text_of = "RLSF over SFT on guided self-play, by the as-is reward model"
    assert result["claims"][text_of]["mean"] == pytest.approx(gain["difference"])
    level = result["claims"][f"{text_of}, at equal length"]
    assert level["mean"] == pytest.approx(gain["at_equal_length"]["difference"])
    assert "judged by their own reward models: first, second" in text and text_of in text
    assert "left out: third" in (tmp_path / "sweep.md").read_text()
