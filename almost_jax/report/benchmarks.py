"""Tables of HHH, TruthfulQA and the Vicuna questions, from evaluation/*.json; nothing where a benchmark is off."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError
from almost_jax.report.tables import Table, number, span

NAMES = {
    "vanilla": "vanilla",
    "sft_self_play": "SFT on plain self-play",
    "sft": "SFT on guided self-play",
    "rlsf": "RLSF",
    "as_is_reward": "as-is reward model",
    "reward": "reward model",
    "reward_ablation/raw": "reward model of all pairs",
    "reward_ablation/heuristic": "reward model after the heuristic filter",
    "reward_ablation/as_is": "reward model after both filters",
}


def benchmark_tables(directory: Path) -> list[tuple[Table, str]]:
    """Tables with captions, of the benchmarks that a run's folder has.

    Raises:
        InputError: a file is damaged.
    """
    found = []
    for name, table in (("hhh", _hhh), ("truthfulqa", _truthfulqa), ("vicuna", _vicuna)):
        path = directory / "evaluation" / f"{name}.json"
        if path.exists():
            try:
                found.append(table(json.loads(path.read_text(encoding="utf-8"))["models"]))
            except (ValueError, LookupError, TypeError, StopIteration) as error:
                raise InputError(f"{path}: is damaged ({error!r}); delete it and run its stage again") from error
    return found


def _hhh(models: Mapping[str, Mapping[str, Any]]) -> tuple[Table, str]:
    subsets = list(next(iter(models.values()))["by_subset"])
    rows = [
        (
            NAMES.get(name, name),
            number(one["accuracy"]),
            *(number(one["by_subset"][subset]) for subset in subsets),
            number(one["per_token"]["accuracy"] if one["per_token"] else None),
        )
        for name, one in models.items()
    ]
    header = ("model", "HHH", *subsets, "per token")
    n = next(iter(models.values()))["n"]
    return Table(header, rows, tuple(range(1, len(header)))), (
        f"Static HHH, {n} comparisons: how often the labelled answer has the higher total log-prob, or the higher "
        "score of a reward model; a tie is a half. “Per token” is what the log-prob per token would have decided."
    )


def _truthfulqa(models: Mapping[str, Mapping[str, Any]]) -> tuple[Table, str]:
    rows = [(NAMES.get(name, name), number(one["mc1"]), number(one["mc2"])) for name, one in models.items()]
    n = next(iter(models.values()))["n"]
    return Table(("model", "MC1", "MC2"), rows, (1, 2)), (
        f"TruthfulQA, {n} questions, with lm-evaluation-harness's prompt: the right choice is likeliest (MC1), and the "
        "share of probability on right choices (MC2). A reward model has scores, so MC1 alone."
    )


def _vicuna(models: Mapping[str, Mapping[str, Any]]) -> tuple[Table, str]:
    rows = []
    for name, one in models.items():
        rate, level = one["win_rate"], one["length_controlled"]
        rows.append(
            (
                NAMES.get(name, name),
                f"{one['win']} / {one['tie']} / {one['loss']}",
                number(rate["mean"] if rate else None),
                span(rate["ci95"] if rate else None, ".3f"),
                number(level["mean"] if level else None),
                str(one["flips"]["flips"]) if one["flips"] else "",
                str(one["unparsed"]),
            )
        )
    first = next(iter(models.values()))
    header = ("model", "win / tie / loss", "win rate", "95% interval", "at equal length", "flips", "unread")
    return Table(header, rows, (2, 3, 4, 5, 6)), (
        f"Answers against those of {NAMES.get(first['against'], first['against'])}, judged by {first['judge']} "
        f"({first['judged_in']}); ties count half. Flips are pairs whose winner depends on the order; unread are pairs "
        "with a reply that names no winner, which are not scored."
    )
