"""The sections of the report where no gold score is at hand: what reward models and lengths say of every step.

Every figure is from evaluation/scores.json, audit/audit.json, the reward models' own evaluation.json and the records.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from almost_jax.config import OverOptimisationConfig, PpoConfig
from almost_jax.evaluation.analyses import AFTER_FILTERS, POLICIES
from almost_jax.evaluation.audit import SCORERS
from almost_jax.evaluation.statistics import agreement
from almost_jax.io.records import Record
from almost_jax.report import plots
from almost_jax.report.blocks import INTERVALS, Block, Dialogue, FigureBlock, Section, TableBlock
from almost_jax.report.tables import FILTER_NAMES, POLICY_NAMES, SOURCE_NAMES, Claim, Table, number, rivals_table, span

MEASURE_NAMES = {"reward": "reward model", "as_is": "as-is reward model"}
PICKS = {**MEASURE_NAMES, "gold": "gold score"}
_PPO_NAMES = {"rlsf": "RLSF, kl_coef ", "over_optimisation": "too weak a penalty, kl_coef "}
GROUP_NAMES = {"configurations": "configurations", "policies": "policies", "demonstrations": "demonstrations"}
VERDICT_NAMES = {"holds": "✓ holds", "noise": "~ within noise", "reversed": "✗ fails"}
SAMPLES_SHOWN = 6
DIALOGUES_SHOWN = 4

Scores = Mapping[str, Any]


def audit_section(audit: Mapping[str, Any] | None) -> Section:
    """The assumption audit, rung by rung; empty without one."""
    title = "Is the rule of thumb more than noise?"
    if audit is None:
        return Section(title, [])
    rows = [
        (
            name,
            rung["rule"],
            SCORERS[scorer].removeprefix("the "),
            number(rung[scorer]["mean"]),
            span(rung[scorer]["ci95"], ".3f"),
            str(rung[scorer]["n"]),
            number(matched["mean"] if (matched := rung[scorer]["length_matched"]) else None),
            number(rung["longer"]),
            VERDICT_NAMES[rung[scorer]["verdict"]],
        )
        for name, rung in audit["rungs"].items()
        for scorer in SCORERS
        if scorer in rung
    ]
    n = audit["queries"]
    if not rows:
        lengths = ", ".join(f"{name} {rung['longer']:.2f}" for name, rung in audit["rungs"].items())
        said = (
            "Nothing was there to judge the rungs of the rule of thumb by: no as-is reward model and no judge. On "
            f"n = {n} queries the better configuration's response was the longer one in these shares: {lengths}."
        )
        return Section(title, [said])
    header = (
        "rung", "rule", "asked", "agreement", "95% interval", "n", "length-matched", "better is longer", "verdict"
    )  # fmt: skip
    caption = (
        f"The assumption audit, before anything was built on the rule: of {n} queries the share to which the better "
        "configuration's response is preferred, ties counting half; n are those of which the one asked gave a verdict. "
        "A rung holds when the interval lies above one half; within noise it adds pairs that are right by chance."
    )
    blocks: list[Block] = [TableBlock(Table(header, rows, (3, 4, 5, 6, 7)), caption)]
    scores = [
        (name, SCORERS[scorer].removeprefix("the "), number(one["mean"]), span(one["ci95"], ".3f"), str(one["n"]))
        for name, by_scorer in audit.get("configurations", {}).items()
        for scorer, one in by_scorer.items()
    ]
    if scores:
        caption = (
            "Mean score of each configuration's responses to the audit's queries: of the as-is reward model in "
            "standard deviations of its reference samples, of the judge from 1 to 10 over every reading of every rung."
        )
        table = Table(("configuration", "by", "score", "95% interval", "n"), scores, (2, 3, 4))
        blocks.append(TableBlock(table, caption))
    return Section(title, blocks)


def _steps(scores: Scores) -> Iterator[tuple[str, str, Scores, Scores, Scores]]:
    """Every step of the method by every measure: its text, the measure, the means of both sides, the gain."""
    groups: tuple[tuple[Scores, Scores, Mapping[str, str]], ...] = (
        (scores["configurations"], scores["gaps"], {}),
        (scores["best_of_n"], scores["best_of_n"].get("gains", {}), {}),
        (scores["demonstrations"], scores["demonstration_gains"], SOURCE_NAMES),
        (scores["policies"], scores["steps"], POLICY_NAMES),
    )
    for means, gains, names in groups:
        for name, by_measure in gains.items():
            better, worse = name.split(" - ")
            text = f"{names.get(better, better)} over {names.get(worse, worse)}"
            if better.isdigit():
                text = f"reward model's choice of {better} over the first sample"
            for measure, gain in by_measure.items():
                yield text, measure, means[worse], means[better], gain


def step_rows(scores: Scores) -> list[tuple[str, ...]]:
    """Every step of the method: its text, the score before and after, the gain, the part that length leaves."""
    rows: list[tuple[str, ...]] = []
    for text, measure, worse, better, gain in _steps(scores):
        level = gain["at_equal_length"]
        rows.append(
            (
                text,
                MEASURE_NAMES[measure],
                number(worse[measure]["mean"]),
                number(better[measure]["mean"]),
                f"{gain['difference']:+.3f}",
                span(gain["ci95"], "+.3f"),
                "–" if level is None else f"{level['difference']:+.3f}",
                "–" if level is None else span(level["ci95"], "+.3f"),
                f"{better['characters'] - worse['characters']:+.0f}",
            )
        )
    return rows


def claims(scores: Scores) -> list[Claim]:
    """Every step as a claim by each measure, as it is and at equal length."""
    found = []
    for text, measure, worse, better, gain in _steps(scores):
        means = worse[measure]["mean"], better[measure]["mean"]
        for part, end in ((gain, ""), (gain["at_equal_length"], ", at equal length")):
            if part is not None:
                named = f"{text}, by the {MEASURE_NAMES[measure]}{end}"
                found.append(Claim("steps", named, *means, part["difference"], tuple(part["ci95"])))
    return found


def figures(scores: Scores, rewards: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The headline figures by name, for tables over several runs; what a run lacks is left out.

    Args:
        scores: evaluation/scores.json.
        rewards: the evaluation.json of the reward models that were trained, by stage.
    """
    found: dict[str, float | None] = {}
    for stage, own in rewards.items():
        name = MEASURE_NAMES["as_is" if stage == "as_is_reward" else "reward"]
        found[f"pairs trained on, {name}"] = own.get("pairs")
        found[f"accuracy on held-out pairs, {name}"] = own.get("accuracy")
        found[f"accuracy on held-out pairs, {name}, length-matched"] = own.get("length_matched_accuracy")
        found[f"accuracy on held-out pairs of the {name}, the longer one wins"] = own.get("longer_wins_accuracy")
    groups: tuple[tuple[str, Scores, Mapping[str, str]], ...] = (
        ("configuration ", scores["configurations"], {}),
        ("best of ", {name: means for name, means in scores["best_of_n"].items() if name != "gains"}, {}),
        ("demonstrations, ", scores["demonstrations"], SOURCE_NAMES),
        ("policy, ", scores["policies"], POLICY_NAMES),
    )
    for start, means, names in groups:
        for name, figure in means.items():
            label = f"{start}{names.get(name, name)}"
            for measure in MEASURE_NAMES:
                if measure in figure:
                    found[f"{label}, by the {MEASURE_NAMES[measure]}"] = figure[measure]["mean"]
            found[f"{label}, characters"] = figure["characters"]
    return {name: float(value) for name, value in found.items() if value is not None}


def steps_table(scores: Scores) -> Table:
    """`step_rows` as a table."""
    header = ("step", "by", "from", "to", "gain", "95% interval", "at equal length", "95% interval", "characters")
    return Table(header, step_rows(scores), tuple(range(2, len(header))))


def sections(
    config: Mapping[str, Any],
    scores: Scores,
    rewards: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
    filters: Sequence[Block],
) -> list[Section]:
    """Everything that can be said without a gold score.

    Args:
        config: the experiment.
        scores: evaluation/scores.json.
        rewards: the evaluation.json of the reward models that were trained, by stage.
        labels: what each configuration is.
        filters: blocks about what the filters did.
    """
    queries = max((figure["reward"]["n"] for figure in scores["policies"].values()), default=0)
    return [
        Section(
            "What each step did, by the reward models",
            [
                "Nothing knows how good these responses really are. The reward model picked the demonstrations and is "
                "what PPO climbs, so that its score rises shows that the steps work, not that answers get better; the "
                "as-is reward model, where there is one, is a second opinion. Length is the first thing to suspect: "
                "“at equal length” is the part of a gain that a line through differences in length does not explain.",
                TableBlock(
                    steps_table(scores),
                    f"Every step against the one before it, on n = {queries:,} held-out questions (demonstrations: on "
                    "the method's own). Scores are in standard deviations of the reward model's reference samples.",
                ),
            ],
        ),
        Section("Does the rule of thumb hold?", _rule_of_thumb(scores, labels)),
        Section("What did the filters do?", filters),
        Section("Does the reward model see more than length?", _reward(scores, rewards)),
        Section("Do the policies improve?", _policies(scores)),
        Section("What did PPO do?", _curve(config, scores)),
    ]


def filter_stages(records: Iterable[Record]) -> list[Block]:
    """How many pairs each filter leaves, how often their chosen response is the longer one, what the as-is model says.

    Args:
        records: of comparisons.jsonl.
    """
    stages: dict[str, Counter[str]] = {name: Counter() for name in AFTER_FILTERS}
    for record in records:
        longer = agreement(len(record["chosen"]["text"]) - len(record["rejected"]["text"]), 1.0)
        margin = record["as_is_margin"]
        for name, dropping in AFTER_FILTERS.items():
            if record["dropped_by"] not in dropping:
                stages[name].update({"kept": 1, "half_longer": round(2 * longer)})
                if margin is not None:
                    stages[name].update({"scored": 1, "agrees": int(margin > 0)})
    rows = [
        (
            FILTER_NAMES[name],
            f"{counts['kept']:,}",
            number(counts["half_longer"] / 2 / counts["kept"] if counts["kept"] else None),
            number(counts["agrees"] / counts["scored"] if counts["scored"] else None),
        )
        for name, counts in stages.items()
    ]
    caption = (
        "The pairs after each filter: how many are kept, the share whose chosen response is the longer one (a tie "
        "counts half), and the share with which the as-is reward model agrees, where there is one."
    )
    header = ("pairs", "kept", "chosen is longer", "as-is reward model agrees")
    return [TableBlock(Table(header, rows, (1, 2, 3)), caption)] if stages["raw"]["kept"] else []


def policy_samples(items: Sequence[Record]) -> list[Block]:
    """Held-out questions with every policy's response, spread evenly over the list."""
    by_query: dict[str, dict[str, Record]] = {}
    for item in items:
        if item["system"].startswith("policy/"):
            by_query.setdefault(item["query_id"], {})[item["system"].removeprefix("policy/")] = item
    groups = list(by_query.values())
    step = max(1, len(groups) // SAMPLES_SHOWN)
    blocks: list[Block] = []
    for group in groups[::step][:SAMPLES_SHOWN]:
        replies = [
            (POLICY_NAMES[name], group[name]["text"], f"reward {group[name]['reward']:+.2f}")
            for name in POLICIES
            if name in group
        ]
        blocks.append(Dialogue(next(iter(group.values()))["query"], "held-out question", replies))
    return [f"Every {step}th held-out question, not picked for its outcome.", *blocks] if blocks else []


def self_play_samples(records: Sequence[Record]) -> list[Block]:
    """Some dialogues of guided self-play, with the score of what was kept and of what was not."""
    step = max(1, len(records) // DIALOGUES_SHOWN)
    blocks: list[Block] = []
    for record in records[::step][:DIALOGUES_SHOWN]:
        turns = record["turns"]
        replies = [_turn(turn) for turn in turns[1:]]
        if replies:
            blocks.append(Dialogue(turns[0]["text"], "self-play", replies))
    outgrown = sum(record.get("outgrown", False) for record in records)
    early = f" {outgrown} of {len(records)} ended early for want of positions." if outgrown else ""
    return [f"Every {step}th dialogue of guided self-play.{early}", *blocks] if blocks else []


def _turn(turn: Mapping[str, Any]) -> tuple[str, str, str]:
    candidates = turn.get("candidates", [])
    scores = [candidate["score"] for candidate in candidates if candidate["score"] is not None]
    if not scores:
        return turn["role"], turn["text"], ""
    kept = max(one["score"] for one in candidates if one["text"] == turn["text"])
    return turn["role"], turn["text"], f"{kept:+.2f}, best of {len(scores)}, worst {min(scores):+.2f}"


def _rule_of_thumb(scores: Scores, labels: Mapping[str, str]) -> list[Block]:
    blocks: list[Block] = []
    for measure in scores["measures"]:
        rows = [
            (labels.get(name, name), figure[measure]["mean"], figure[measure]["ci95"])
            for name, figure in scores["configurations"].items()
        ]
        n = max(figure[measure]["n"] for figure in scores["configurations"].values())
        blocks.append(
            FigureBlock(
                f"configurations_{measure}",
                plots.interval_dots(rows, f"mean score of the {MEASURE_NAMES[measure]}"),
                f"Mean score of each configuration's responses to n = {n:,} held-out questions, in the order in which "
                f"the rule of thumb ranks them, by the {MEASURE_NAMES[measure]}. {INTERVALS}",
            )
        )
    rows_of_rungs = [
        (
            name,
            MEASURE_NAMES[measure],
            number(rung[measure]["mean"]),
            span(rung[measure]["ci95"], ".3f"),
            number(matched["mean"] if (matched := rung[measure]["length_matched"]) else None),
            number(rung["longer"]),
        )
        for name, rung in scores["rungs"].items()
        for measure in scores["measures"]
    ]
    header = ("rung", "by", "agreement", "95% interval", "length-matched", "better is longer")
    caption = "Share of held-out questions to which the better configuration's response has the higher score."
    blocks.append(TableBlock(Table(header, rows_of_rungs, (2, 3, 4, 5)), caption))
    return blocks


def _reward(scores: Scores, rewards: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    rows = [
        (
            MEASURE_NAMES["as_is" if stage == "as_is_reward" else "reward"],
            f"{found['held_out']:,}",
            number(found["accuracy"]),
            number(found["longer_wins_accuracy"]),
            number(found["length_matched_accuracy"]),
        )
        for stage, found in rewards.items()
        if found.get("held_out")
    ]
    blocks: list[Block] = []
    if rows:
        caption = (
            "How often each reward model prefers the chosen response of held-out pairs of its own kind, beside the "
            "baseline that prefers the longer one, and on pairs weighed so that this baseline would score 0.5."
        )
        header = ("scorer", "held-out pairs", "accuracy", "the longer one wins", "length-matched")
        blocks.append(TableBlock(Table(header, rows, (1, 2, 3, 4)), caption))
    for name, found in scores["by_length"].items():
        figure = plots.score_by_length(found)
        if figure is not None:
            n = sum(group["n"] for group in found["bins"])
            caption = (
                f"Mean score against length of response: {GROUP_NAMES[name]}, n = {n:,}, in bins of nearly equal size; "
                "r is the correlation over responses."
            )
            blocks.append(FigureBlock(f"score_by_length_{name}", figure, caption))
    return blocks


def _policies(scores: Scores) -> list[Block]:
    if not scores["policies"]:
        return []
    blocks: list[Block] = []
    lengths = ", ".join(
        f"{POLICY_NAMES[name]} {figure['characters']:.0f}" for name, figure in scores["policies"].items()
    )
    cut = ", ".join(
        f"{POLICY_NAMES[name]} {scores['lengths'][f'policy/{name}']['unfinished']:.0%}" for name in scores["policies"]
    )
    for measure in scores["measures"]:
        rows = [
            (POLICY_NAMES[name], figure[measure]["mean"], figure[measure]["ci95"])
            for name, figure in scores["policies"].items()
        ]
        n = max(figure[measure]["n"] for figure in scores["policies"].values())
        blocks.append(
            FigureBlock(
                f"policies_{measure}",
                plots.interval_dots(rows, f"mean score of the {MEASURE_NAMES[measure]}"),
                f"Mean score of the policies on n = {n:,} held-out questions, in the order of the method, by the "
                f"{MEASURE_NAMES[measure]}. {INTERVALS} Mean lengths in characters: {lengths}. Cut off by the token "
                f"budget: {cut}.",
            )
        )
    for measure, found in scores.get("rivals", {}).items():
        # SFT and RLSF alone stand above.
        if len(found["rivals"]) > 2:
            text = "What else can be made of the SFT policy and the same synthetic pairs, on the same questions."
            blocks.append(TableBlock(rivals_table(found, f"{MEASURE_NAMES[measure]}'s score"), text))
    return blocks


def named_curves(config: Mapping[str, Any], scores: Scores) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The points of each run of PPO that has any, by what it is called here."""
    coefficients = {
        "rlsf": config.get("ppo", {}).get("kl_coef", PpoConfig().kl_coef),
        "over_optimisation": (config.get("over_optimisation") or {}).get("kl_coef", OverOptimisationConfig().kl_coef),
    }
    points = {"rlsf": scores["rlsf_curve"], "over_optimisation": scores.get("over_optimised_curve")}
    return {f"{_PPO_NAMES[run]}{coefficients[run]:g}": curve for run, curve in points.items() if curve}


def selection(curves: Mapping[str, Sequence[Mapping[str, Any]]], scores: Scores) -> list[Block]:
    """Which kept step each score would pick on the held-out queries, and what the pick is worth by every score."""
    if "selected" not in scores:
        return []
    rows = []
    picks = scores["selected"].values()
    # Both have the runs that kept policies, in one order.
    for (name, curve), chosen in zip(curves.items(), picks, strict=True):
        points = {point["step"]: point for point in curve}
        wanted = [("last step", curve[-1]["step"]), *((PICKS[score], step) for score, step in chosen.items())]
        for picked_by, step in wanted:
            point = points[step]
            rows.append((
                name, picked_by, str(step), f"{point['kl']:.2f}",
                *(f"{point[score]:.3f}" for score in PICKS if score in point),
            ))  # fmt: skip
    if not rows:
        return []
    measured = [score for score in PICKS if any(score in point for curve in curves.values() for point in curve)]
    header = ("PPO with", "picked by", "step", "KL", *(PICKS[score] for score in measured))
    text = (
        "The step that each score would pick on the held-out queries. PPO climbed the reward model, so its pick is "
        "spoiled by what it was taken in by; the as-is reward model, where there is one, is a judge that PPO never saw."
    )
    return [TableBlock(Table(header, rows, tuple(range(2, len(header)))), text)]


def _curve(config: Mapping[str, Any], scores: Scores) -> list[Block]:
    curves = named_curves(config, scores)
    figure = plots.over_optimisation(curves)
    if figure is None:
        return []
    n = scores["rlsf_curve"][-1]["n"]
    return [
        FigureBlock(
            "over_optimisation",
            figure,
            f"Scores of PPO's policies against their KL from the SFT policy, on n = {n:,} held-out questions at every "
            "kept step; the line follows training. Where the reward rises and the as-is reward falls, the reward model "
            f"is being over-optimised. {INTERVALS}",
        ),
        *selection(curves, scores),
    ]
