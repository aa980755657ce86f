"""The report of a run without a gold score: what reward models and lengths say, and nothing from outside the run."""

import json
import re
from pathlib import Path
from typing import Any

from almost_jax.report import page, scored, tables


def test_every_section_has_its_figures_with_n(scored_run: Path) -> None:
    page.build(scored_run)
    text = (scored_run / "report.md").read_text()
    figures = json.loads((scored_run / "evaluation" / "scores.json").read_text())
    for title in (
        "Is the rule of thumb more than noise?",
        "What each step did, by the reward models",
        "Does the rule of thumb hold?",
        "What did the filters do?",
        "Does the reward model see more than length?",
        "Do the policies improve?",
        "What did PPO do?",
        "Sample responses",
        "Sample self-play",
    ):
        assert f"## {title}" in text
    assert "n = 60 held-out" in text and "0.876" in text and "0.831" in text and "0.564" in text
    assert "2 in queries" in text
    for group in ("configurations", "policies", "demonstrations"):
        assert f"score_by_length_{group}.png" in text
    for name, figure in figures["policies"].items():
        assert f"{figure['characters']:.0f}" in text, name
    assert re.search(r"demonstrations, n = 40", text)
    html = (scored_run / "report.html").read_text()
    assert "<script>alert(1)" not in html and "gold score" not in text.split("## How the figures")[0].replace(
        "No gold score", ""
    )


def test_the_audit_names_rule_scorer_interval_and_verdict(scored_run: Path) -> None:
    section = scored.audit_section(json.loads((scored_run / "audit" / "audit.json").read_text()))
    (block,) = section.blocks
    rows = block.table.rows  # type: ignore[union-attr]
    assert rows[0] == (
        "A over B", "demonstrations", "as-is reward model", "0.731", "0.612 to 0.823", "25", "0.542", "0.812",
        "✓ holds",
    )  # fmt: skip
    assert rows[1][2:] == ("as-is reward model", "0.499", "0.401 to 0.598", "25", "–", "0.523", "~ within noise")
    assert rows[2][2] == "judge" and rows[2][5] == "19", "each scorer has an n of its own"
    assert scored.audit_section(None).blocks == []
    alone: dict[str, Any] = {"queries": 9, "rungs": {"A over B": {"rule": "shots", "longer": 0.44}}}
    assert "A over B 0.44" in str(scored.audit_section(alone).blocks[0])


def test_the_audit_shows_the_scores_of_each_configuration(scored_run: Path) -> None:
    means = {
        "A": {"as_is": {"mean": 0.5126, "ci95": [0.1, 0.9], "n": 25}, "judge": {"mean": 8.25, "ci95": [8, 9], "n": 50}},
        "B": {"judge": {"mean": 4.5, "ci95": [4, 5], "n": 100}},
    }
    audit = json.loads((scored_run / "audit" / "audit.json").read_text())
    table = scored.audit_section({**audit, "configurations": means}).blocks[1].table  # type: ignore[union-attr]
    assert table.rows == [
        ("A", "as-is reward model", "0.513", "0.100 to 0.900", "25"),
        ("A", "judge", "8.250", "8.000 to 9.000", "50"),
        ("B", "judge", "4.500", "4.000 to 5.000", "100"),
    ]


def test_the_final_table_has_every_step_by_every_measure(scored_run: Path) -> None:
    figures = json.loads((scored_run / "evaluation" / "scores.json").read_text())
    rows = scored.step_rows(figures)
    texts = [(row[0], row[1]) for row in rows]
    assert texts == [
        *((step, by) for step in ("A over B", "B over C") for by in ("reward model", "as-is reward model")),
        ("reward model's choice of 4 over the first sample", "reward model"),
        ("reward model's choice of 4 over the first sample", "as-is reward model"),
        ("reward-guided self-play over plain self-play", "reward model"),
        *(
            (f"{better} over {worse}", by)
            for better, worse in (
                ("SFT on plain self-play", "prompted"),
                ("SFT on guided self-play", "SFT on plain self-play"),
                ("RLSF", "SFT on guided self-play"),
            )
            for by in ("reward model", "as-is reward model")
        ),
    ]
    gain = figures["steps"]["rlsf - sft"]["reward"]
    row = rows[-2]
    assert row[4] == f"{gain['difference']:+.3f}" and row[6] == f"{gain['at_equal_length']['difference']:+.3f}"
    assert page.summary_table(scored_run) == tables.as_markdown(scored.steps_table(figures), escape=False)


def test_each_filter_says_how_many_pairs_it_leaves_and_how_long_they_are() -> None:
    def pair(chosen: str, rejected: str, dropped: str | None, margin: float | None) -> dict[str, Any]:
        sides = {"chosen": {"text": chosen}, "rejected": {"text": rejected}}
        return {**sides, "dropped_by": dropped, "as_is_margin": margin}

    records = [
        pair("long", "it", None, 0.5),
        pair("even", "size", None, 0.1),
        pair("a", "longer", "as_is_reward", -0.5),
        pair("a", "longer", "length", 2.0),
        pair("", "x", "empty", None),
    ]
    (block,) = scored.filter_stages(iter(records))
    assert block.table.rows == [  # type: ignore[union-attr]
        ("all pairs", "5", "0.300", "0.750"),
        ("heuristic filter", "3", "0.500", "0.667"),
        ("+ as-is filter", "2", "0.750", "1.000"),
    ]
    assert scored.filter_stages([]) == []
