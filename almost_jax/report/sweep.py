"""One table over the runs of a sweep: each figure's mean with a t-interval, and in how many runs each claim holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_jax.evaluation.statistics import t_interval
from almost_jax.io.records import write_bytes
from almost_jax.report import scored
from almost_jax.report.blocks import Section, TableBlock
from almost_jax.report.page import environment
from almost_jax.report.sections import load_json, load_rewards
from almost_jax.report.tables import Claim, Table, as_markdown, claims, figures, number, span
from almost_jax.report.text import markdown, one_line

POINTS_SHOWN = 6  # with more points than this their single values stay in sweep.json


@dataclass(frozen=True)
class Outcome:
    """What came of one run: its figures by name, and what it says of each claim.

    `by_gold`: by the gold score, else by the run's own reward models.
    """

    figures: Mapping[str, float]
    claims: Sequence[Claim]
    by_gold: bool


def outcome(folder: Path) -> Outcome | None:
    """What came of a run, from gold.json or else scores.json and the reward models' evaluation.json; None without.

    Raises:
        InputError: a file is damaged.
    """
    gold = load_json(folder / "evaluation" / "gold.json")
    if gold is not None:
        return of_gold(gold)
    scores = load_json(folder / "evaluation" / "scores.json")
    if scores is None:
        return None
    return Outcome(scored.figures(scores, load_rewards(folder)), scored.claims(scores), by_gold=False)


def of_gold(gold: Mapping[str, Any]) -> Outcome:
    """What gold.json says."""
    return Outcome(figures(gold), claims(gold), by_gold=True)


def write_sweep(directory: Path, points: Sequence[tuple[str, Path]]) -> str:
    """Write sweep.json, sweep.md and sweep.html over the runs of a sweep.

    Args:
        directory: where they go.
        points: (label, run folder) of every point; those without an evaluation are named and left out.

    Returns:
        The tables in markdown, fit for a terminal: control characters are made visible; print it without markup.

    Raises:
        InputError: a run's figures are damaged.
    """
    found = {label: outcome(folder) for label, folder in points}
    outcomes = {label: one for label, one in found.items() if one is not None}
    missing = [label for label, one in found.items() if one is None]
    by_reward = [label for label, one in outcomes.items() if not one.by_gold]
    result = summarise(outcomes) | {"missing": missing, "by_reward_models": by_reward}
    content = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(directory / "sweep.json", content.encode("utf-8", "replace"))
    title = f"{directory.name}: {len(outcomes)} of {len(points)} runs"
    notes = _notes(missing, by_reward, len(outcomes))
    blocks: list[str | TableBlock] = [*notes, *_tables(result)]
    page = environment().get_template("page.html.j2")
    html = page.render(
        title=title,
        summary=" ".join(notes),
        sections=[Section("Over all runs", [block for block in blocks if isinstance(block, TableBlock)])],
        svg=None,
        kind=lambda block: type(block).__name__,
        noted="",
    )
    write_bytes(directory / "sweep.html", html.encode("utf-8", "replace"))
    write_bytes(directory / "sweep.md", _text(title, blocks, escape=True).encode("utf-8", "replace"))
    return _text(title, blocks, escape=False)


def summarise(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The figures and claims of several runs over the points that have them.

    Returns:
        "points": labels, "figures": {name: {"values": {label: value}, "mean", "ci95", "n"}} and "claims": {text:
        {"gains": {label: gain}, "mean", "ci95" of the gain over points, "n", "holds", "within_noise", "fails",
        "positive"}}: the counts are of points, "positive" counts gains above 0, whether or not they can be told from
        noise within their run.
    """
    values: dict[str, dict[str, float]] = {}
    judged: dict[str, dict[str, Claim]] = {}
    for label, one in outcomes.items():
        for name, value in one.figures.items():
            values.setdefault(name, {})[label] = value
        for claim in one.claims:
            judged.setdefault(claim.text, {})[label] = claim
    return {
        "points": list(outcomes),
        "figures": {name: {"values": row, **t_interval(list(row.values()))} for name, row in values.items()},
        "claims": {text: _over_points(row) for text, row in judged.items()},
    }


def _over_points(row: Mapping[str, Claim]) -> dict[str, Any]:
    gains = {label: claim.gain for label, claim in row.items()}
    verdicts = [claim.verdict for claim in row.values()]
    return {
        "gains": gains,
        **t_interval(list(gains.values())),
        "holds": verdicts.count("holds"),
        "within_noise": verdicts.count("within noise"),
        "fails": verdicts.count("fails"),
        "positive": sum(gain > 0 for gain in gains.values()),
    }


def _notes(missing: Sequence[str], by_reward: Sequence[str], n: int) -> list[str]:
    notes = [f"Without an evaluation, and left out: {', '.join(missing)}."] if missing else []
    if by_reward:
        notes.append(
            f"Without gold scores, and judged by their own reward models: {', '.join(by_reward)}. A score is in "
            "standard deviations of its run's own reward model: it compares within a run, and between runs that share "
            "the model."
        )
    if n == 1:
        notes.append("With a single run there are no intervals over runs.")
    return notes


def _tables(result: Mapping[str, Any]) -> list[TableBlock]:
    points = result["points"]
    if not points:
        return []
    shown = points if len(points) <= POINTS_SHOWN else []
    claim_rows = [
        (
            text,
            f"{row['holds']}/{row['n']}",
            f"{row['positive']}/{row['n']}",
            f"{row['mean']:+.3f}",
            span(row["ci95"], "+.3f"),
        )
        for text, row in result["claims"].items()
    ]
    figure_rows = [
        (
            name,
            *(_figure(name, row["values"].get(label)) for label in shown),
            _figure(name, row["mean"]),
            span(row["ci95"], ",.0f" if _is_count(name) else ".3f"),
        )
        for name, row in result["figures"].items()
    ]
    n = len(points)
    return [
        TableBlock(
            Table(("claim", "holds", "gain > 0", "mean gain", "95% t-interval"), claim_rows, (1, 2, 3, 4)),
            f"Claims over n = {n} runs: in how many the claim holds at the 95% level, in how many the gain is above 0 "
            "at all, and the mean gain with Student's t-interval over runs.",
        ),
        TableBlock(
            Table(("figure", *shown, "mean", "95% t-interval"), figure_rows, tuple(range(1, len(shown) + 3))),
            f"Figures over n = {n} runs, with Student's t-interval over runs.",
        ),
    ]


def _is_count(name: str) -> bool:
    return name.startswith("pairs ") or name.endswith(", characters")


def _figure(name: str, value: float | None) -> str:
    return f"{value:,.0f}" if _is_count(name) and value is not None else number(value)


def _text(title: str, blocks: Sequence[str | TableBlock], escape: bool) -> str:
    lines = [f"# {markdown(title)}"] if escape else []
    for block in blocks:
        if isinstance(block, TableBlock):
            lines += [as_markdown(block.table, escape), *([markdown(block.caption)] if escape else [])]
        else:
            lines.append(markdown(block) if escape else one_line(block))
    return "\n\n".join(lines) + "\n"
