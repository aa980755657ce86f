"""The claims of the paper as rows with a verdict, and the tables of the report, as data and as markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from almost_jax.evaluation.analyses import AFTER_FILTERS, POLICIES
from almost_jax.report.text import markdown, one_line

Gold: TypeAlias = Mapping[str, Any]
Verdict: TypeAlias = Literal["holds", "within noise", "fails"]

MARKS: dict[Verdict, str] = {"holds": "✓", "within noise": "~", "fails": "✗"}
POLICY_NAMES = {
    "prompted": "prompted",
    "sft_self_play": "SFT on plain self-play",
    "sft": "SFT on guided self-play",
    "rlsf": "RLSF",
}
RIVAL_NAMES = {
    **POLICY_NAMES,
    "dpo": "DPO on the same pairs",
    "sft_best_of_n": "SFT, reward model's choice of N samples",
}
FILTER_NAMES = {"raw": "all pairs", "heuristic": "heuristic filter", "as_is": "+ as-is filter"}
SOURCE_NAMES = {"self_play": "plain self-play", "reward_guided": "reward-guided self-play"}
SCORER_NAMES = {
    "accuracy": "reward model",
    "length_matched_accuracy": "reward model, length-matched pairs",
    "longer_wins_accuracy": "the longer one wins",
    "as_is_accuracy": "as-is reward model",
}


@dataclass(frozen=True)
class Claim:
    """What a step should do, what it did, and whether that can be told from noise.

    `worse` and `better` are the two figures compared, `gain` their difference with its interval.
    """

    group: str
    text: str
    worse: float
    better: float
    gain: float
    ci95: tuple[float, float]

    @property
    def verdict(self) -> Verdict:
        """`holds` when the interval lies above 0, `fails` when it lies below, else `within noise`."""
        if self.ci95[0] > 0:
            return "holds"
        return "fails" if self.ci95[1] < 0 else "within noise"


@dataclass(frozen=True)
class Table:
    """Cells as shown, one list a row; `numeric` names the columns that are set flush right."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: tuple[int, ...]


def claims(gold: Gold) -> list[Claim]:
    """Every claim that the figures of gold.json can judge, in the order of the method."""
    found: list[Claim] = []

    def add(group: str, text: str, worse: float, better: float, gain: Mapping[str, Any] | None) -> None:
        if gain is not None:
            low, high = gain["ci95"]
            found.append(Claim(group, text, worse, better, gain["difference"], (low, high)))

    means = {name: figure["mean"] for name, figure in gold["configurations"].items()}
    names = list(means)
    for better, worse in zip(names, names[1:], strict=False):
        add(
            "rule of thumb",
            f"{better} beats {worse}",
            means[worse],
            means[better],
            gold["gaps"].get(f"{better} - {worse}"),
        )
    pairs = {name: gold["pairs"][name]["accuracy"] for name in AFTER_FILTERS}
    for worse, better, text in (
        ("raw", "heuristic", "heuristic filter makes pairs more accurate"),
        ("heuristic", "as_is", "as-is filter makes them more accurate still"),
    ):
        add("filters", text, pairs[worse], pairs[better], gold["pair_gains"].get(f"{better} - {worse}"))
    accuracy = gold["reward_model"]
    for rival, text in (
        ("longer_wins_accuracy", "reward model beats “longer wins”"),
        ("as_is_accuracy", "reward model beats the as-is reward model"),
    ):
        gain = gold["reward_model_gains"].get(f"accuracy - {rival}")
        add("reward model", text, accuracy[rival], accuracy["accuracy"], gain)
    matched = gold["reward_model_details"]["length_matched_accuracy"]
    if matched:
        low, high = (bound - 0.5 for bound in matched["ci95"])
        gain = {"difference": matched["mean"] - 0.5, "ci95": (low, high)}
        add("reward model", "reward model beats chance at equal length", 0.5, matched["mean"], gain)
    best = {name: value for name, value in gold["best_of_n"].items() if name.isdigit() and name != "1"}
    for name, value in best.items():
        text = f"reward model's choice of {name} beats the first sample"
        add("best of n", text, gold["best_of_n"]["1"], value, gold["best_of_n_gains"].get(f"{name} - 1"))
    sources = gold["demonstrations"]
    if len(sources) == 2:
        text = "reward-guided demonstrations beat plain self-play"
        gain = gold["demonstration_gains"].get("reward_guided - self_play")
        add("demonstrations", text, sources["self_play"]["mean"], sources["reward_guided"]["mean"], gain)
    policies = {name: gold["policies"][name]["mean"] for name in POLICIES if name in gold["policies"]}
    order = list(policies)
    for worse, better in zip(order, order[1:], strict=False):
        text = f"{POLICY_NAMES[better]} beats {POLICY_NAMES[worse]}"
        add("policies", text, policies[worse], policies[better], gold["steps"].get(f"{better} - {worse}"))
    rivals = gold.get("rivals", {})
    for better, worse, text in (("dpo", "sft", "DPO beats SFT on guided self-play"), ("rlsf", "dpo", "RLSF beats DPO")):
        if better in rivals and worse in rivals:
            gain = gold["rival_gains"].get(f"{better} - {worse}")
            add("policies", text, rivals[worse]["mean"], rivals[better]["mean"], gain)
    return found


def rivals_table(gold: Gold, score: str = "gold score") -> Table:
    """RLSF, DPO and best-of-N from one SFT policy: their score, gain over SFT, and what RLSF gains over each."""
    rows = []
    for name, figure in gold["rivals"].items():
        gains = [gold["rival_gains"].get(key) for key in (f"{name} - sft", f"rlsf - {name}")]
        # What RLSF gains over SFT stands in its own row already.
        shown = gains[:1] + ([None] if name == "sft" else gains[1:])
        cells = [
            cell
            for gain in shown
            for cell in (("–", "–") if gain is None else (f"{gain['difference']:+.3f}", span(gain["ci95"], "+.3f")))
        ]
        mean, ci95 = number(figure["mean"]), span(figure["ci95"], ".3f")
        rows.append((RIVAL_NAMES[name], mean, ci95, *cells, f"{figure['characters']:.0f}"))
    interval = "95% interval"
    header = ("policy", score, interval, "over SFT", interval, "RLSF over it", interval, "characters")
    return Table(header, rows, tuple(range(1, len(header))))


def reward_models_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each reward model does on its own held-out pairs, length in particular: {name: its evaluation.json}."""
    rows = [
        (
            name,
            f"{found['held_out']:,}",
            number(found["accuracy"]),
            number(found["longer_wins_accuracy"]),
            number(found["length_matched_accuracy"]),
            span(found["length_matched_ci95"], ".3f"),
            f"{found['length_correlation']:.2f}",
            "length alone" if found["length_only"] else "",
        )
        for name, found in figures.items()
    ]
    header = (
        "reward model", "held-out pairs", "accuracy", "the longer one wins", "length-matched", "95% interval",
        "rank correlation with length", "warning",
    )  # fmt: skip
    return Table(header, rows, tuple(range(1, len(header) - 1)))


def figures(gold: Gold) -> dict[str, float]:
    """The headline figures by name, for tables over several runs; what a run lacks is left out."""
    found: dict[str, float | None] = {}
    for name, figure in gold["configurations"].items():
        found[f"configuration {name}"] = figure["mean"]
    for name in AFTER_FILTERS:
        found[f"pair accuracy, {FILTER_NAMES[name]}"] = gold["pairs"][name]["accuracy"]
    for name in AFTER_FILTERS:
        found[f"pairs kept, {FILTER_NAMES[name]}"] = gold["pairs"][name]["kept"]
    for name, label in SCORER_NAMES.items():
        found[f"preference accuracy, {label}"] = gold["reward_model"][name]
    for name, value in gold["best_of_n"].items():
        label = f"best of {name.removeprefix('oracle_')} by gold" if name.startswith("oracle") else f"best of {name}"
        found[label] = value
    for name, figure in gold["demonstrations"].items():
        found[f"demonstrations, {SOURCE_NAMES.get(name, name)}"] = figure["mean"]
    for name, figure in gold["policies"].items():
        found[f"policy, {POLICY_NAMES.get(name, name)}"] = figure["mean"]
    return {name: float(value) for name, value in found.items() if value is not None}


def claims_table(found: Sequence[Claim]) -> Table:
    """The final table: one row a claim."""
    return Table(
        ("claim", "from", "to", "gain", "95% interval", "verdict"),
        [
            (
                claim.text,
                number(claim.worse),
                number(claim.better),
                f"{claim.gain:+.3f}",
                span(claim.ci95, "+.3f"),
                f"{MARKS[claim.verdict]} {claim.verdict}",
            )
            for claim in found
        ],
        (1, 2, 3, 4),
    )


def kinds_table(by_kind: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Mean gold score of each policy on each kind of query."""
    systems = [name for name in POLICIES if f"policy/{name}" in by_kind]
    groups = [by_kind[f"policy/{name}"] for name in systems]
    kinds = sorted({kind for group in groups for kind in group})
    rows = [
        (
            kind.replace("_", " "),
            str(max(group[kind]["n"] for group in groups if kind in group)),
            *(number(group[kind]["mean"]) if kind in group else "–" for group in groups),
        )
        for kind in kinds
    ]
    return Table(
        ("kind of query", "n", *(POLICY_NAMES[name] for name in systems)), rows, tuple(range(1, len(systems) + 2))
    )


def means_table(label: str, rows: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], measure: str) -> Table:
    """Means with intervals: {key: {"mean", "ci95", "n"}}, shown under `names`."""
    return Table(
        (label, measure, "95% interval", "n"),
        [
            (names.get(key, key), number(row["mean"]), span(row["ci95"], ".3f"), str(row["n"]))
            for key, row in rows.items()
            if row is not None
        ],
        (1, 2, 3),
    )


def filters_table(gold: Gold) -> Table:
    """Pairs kept and their accuracy after each filter, with length balanced out beside it."""
    rows = []
    for name in AFTER_FILTERS:
        pairs, details = gold["pairs"][name], gold["pair_details"][name]
        ci95 = details["accuracy"]["ci95"] if details["accuracy"] else None
        rows.append(
            (
                FILTER_NAMES[name],
                f"{pairs['kept']:,}",
                number(pairs["accuracy"]),
                span(ci95, ".3f"),
                number(matched["mean"] if (matched := details["length_matched_accuracy"]) else None),
                number(details["chosen_is_longer"]),
                str(pairs["ties"]),
            )
        )
    header = ("pairs", "kept", "accuracy", "95% interval", "length-matched", "chosen is longer", "ties")
    return Table(header, rows, tuple(range(1, len(header))))


def ablation_table(figures: Mapping[str, Any], trained: Mapping[str, Any]) -> Table:
    """The reward models of an ablation on one set of held-out pairs, and "the longer one wins".

    Args:
        figures: of one set, from `ablation_figures`.
        trained: {set: {"pairs"}}, how many pairs each model learned from.
    """
    rows = []
    for name, accuracy in figures["accuracy"].items():
        matched = figures["length_matched"][name]
        gain = next((gain for steps, gain in figures["gains"].items() if steps.startswith(f"{name} - ")), None)
        rows.append(
            (
                FILTER_NAMES[name],
                f"{trained[name]['pairs']:,}",
                number(accuracy["mean"]),
                span(accuracy["ci95"], ".3f"),
                "–" if gain is None else f"{gain['difference']:+.3f}",
                span(None if gain is None else gain["ci95"], "+.3f"),
                number(matched and matched["mean"]),
                span(matched and matched["ci95"], ".3f"),
            )
        )
    longer = figures["longer_wins"]
    rows.append(("the longer one wins", "–", number(longer["mean"]), span(longer["ci95"], ".3f"), "–", "–", "–", "–"))
    header = (
        "learned from", "pairs", "accuracy", "95% interval", "gain", "95% interval", "length-matched", "95% interval"
    )  # fmt: skip
    return Table(header, rows, tuple(range(1, len(header))))


def number(value: float | None) -> str:
    """Three decimals, a dash for what isn't there."""
    return "–" if value is None else f"{value:.3f}"


def span(ci95: Sequence[float] | None, form: str) -> str:
    """An interval as text."""
    return "–" if ci95 is None else f"{ci95[0]:{form}} to {ci95[1]:{form}}"


def as_markdown(table: Table, escape: bool) -> str:
    """A markdown table padded to even columns, so that it reads well in a terminal too.

    Args:
        table: the table.
        escape: whether cells are escaped for markdown; without, they are only freed of control characters, which is
            what a terminal needs.
    """
    clean = markdown if escape else (lambda cell: one_line(cell).replace("|", "¦"))
    cells = [[clean(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(table.header))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column in table.numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if column in table.numeric else "-" * width for column, width in enumerate(widths)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *(line(row) for row in cells[1:])])


def rollout_note(record: Mapping[str, Any]) -> str:
    """What is said beside a response of rlsf/rollouts.jsonl: its score, KL and mean advantage, where they are known."""
    figures = (("score", "reward", ".2f"), ("kl", "KL", ".2f"), ("advantage", "advantage", "+.2f"))
    return ", ".join(f"{name} {record[key]:{form}}" for key, name, form in figures if record[key] is not None)
