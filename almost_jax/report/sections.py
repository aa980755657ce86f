"""What the report says: sections of paragraphs, figures, tables and dialogues, from the files of a run.

Nothing here knows of HTML or markdown. A run without gold scores, or one that isn't finished, gets the sections that
its files allow.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError
from almost_jax.evaluation.analyses import DEFINITIONS, POLICIES
from almost_jax.io.records import Record, iter_records, read_records
from almost_jax.report import plots, scored, tables
from almost_jax.report.benchmarks import benchmark_tables
from almost_jax.report.blocks import INTERVALS, Block, Dialogue, FigureBlock, Listing, Section, TableBlock
from almost_jax.report.tables import Claim, Table, Verdict
from almost_jax.stages.templates import load_yaml

# The stages that train, and which of their metrics are worth a look, in this order and as far as they exist.
CURVES = {
    "as_is_reward": ("loss", "accuracy", "held_out_accuracy"),
    "reward": ("loss", "accuracy", "held_out_accuracy"),
    "sft_self_play": ("loss", "accuracy", "held_out_loss"),
    "sft": ("loss", "accuracy", "held_out_loss"),
    "dpo": ("loss", "accuracy", "held_out_loss", "held_out_accuracy"),
    "rlsf": ("reward", "kl", "response_length", "entropy", "missing_eos", "explained_variance"),
    "over_optimisation": ("reward", "kl", "response_length", "entropy", "missing_eos", "explained_variance"),
}
STAGE_NAMES = {
    "as_is_reward": "as-is reward model",
    "reward": "reward model",
    "sft_self_play": "SFT on plain self-play",
    "sft": "SFT on guided self-play",
    "dpo": "DPO",
    "rlsf": "RLSF",
    "over_optimisation": "PPO with too weak a KL penalty",
}
SAMPLES_SHOWN = 8


@dataclass(frozen=True)
class Material:
    """What a run's folder holds for the report; what isn't there is None or empty."""

    directory: Path
    config_text: str
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    gold: Mapping[str, Any] | None
    scores: Mapping[str, Any] | None
    audit: Mapping[str, Any] | None
    items: Sequence[Record]


def load(directory: Path) -> Material:
    """Read what the report needs.

    Raises:
        InputError: the folder is no run, having no config.yaml, or a file is damaged.
    """
    config = directory / "config.yaml"
    if not config.is_file():
        raise InputError(f"{directory}: no run here: it has no config.yaml")
    items = directory / "evaluation" / "items.jsonl"
    return Material(
        directory,
        config.read_text(encoding="utf-8"),
        load_yaml(config),
        load_json(directory / "status.json") or {},
        load_json(directory / "evaluation" / "gold.json"),
        load_json(directory / "evaluation" / "scores.json"),
        load_json(directory / "audit" / "audit.json"),
        read_records(items) if items.exists() else [],
    )


def load_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's object, None when there is no such file.

    Raises:
        InputError: it isn't JSON.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); delete it and run its stage again") from error
    return content


def load_rewards(directory: Path) -> dict[str, dict[str, Any]]:
    """The evaluation.json of each reward model that a run has trained, by stage.

    Raises:
        InputError: one isn't JSON.
    """
    found = {stage: load_json(directory / stage / "evaluation.json") for stage in ("as_is_reward", "reward")}
    return {stage: figures for stage, figures in found.items() if figures is not None}


def sections(material: Material) -> list[Section]:
    """The whole report, without sections that would be empty. Call inside `plots.style()`."""
    found = [scored.audit_section(material.audit)]
    if material.gold is not None:
        found += _judged(material, material.gold)
    elif material.scores is not None:
        rewards = load_rewards(material.directory)
        found += scored.sections(material.config, material.scores, rewards, _labels(material), _comparisons(material))
    else:
        found.append(Section("Comparisons", _comparisons(material)))
    found += [
        Section("What are the filters worth to the reward model?", _ablation(material)),
        Section("Benchmarks", [TableBlock(*one) for one in benchmark_tables(material.directory)]),
        Section("Sample responses", _dialogues(material)),
        Section("Sample self-play", _self_play(material) if material.gold is None else []),
        Section("Training", _training(material)),
        Section("How the figures are defined", _definitions(material)),
        Section("Settings and versions", _provenance(material)),
    ]
    return [section for section in found if section.blocks]


def abstract(material: Material) -> str:
    """One paragraph: what was run, and what came of it."""
    start = f"Run {material.config.get('name', material.directory.name)}, seed {material.config.get('seed', 0)}."
    if material.gold is None:
        said = f"No gold score was taken, so nothing here says how good the responses really are{_instead(material)}."
        return f"{start} {said}"
    found = tables.claims(material.gold)
    counts = Counter(claim.verdict for claim in found)
    parts = [f"{counts['holds']} of {len(found)} claims hold at the 95% level"]
    misses: tuple[tuple[Verdict, str], ...] = (("within noise", "can't be told from noise"), ("fails", "fail"))
    for verdict, text in misses:
        named = "; ".join(claim.text for claim in found if claim.verdict == verdict)
        if named:
            parts.append(f"{counts[verdict]} {text} ({named})")
    return f"{start} {', '.join(parts)}."


def _judged(material: Material, gold: Mapping[str, Any]) -> list[Section]:
    """The sections that rest on gold scores."""
    found: Sequence[Claim] = tables.claims(gold)
    queries = max((figure["n"] for figure in gold["policies"].values()), default=0)
    return [
        Section(
            "What each step claims, and what it did",
            [
                TableBlock(
                    tables.claims_table(found),
                    f"Every step of the method against the one before it, judged by the gold score on {queries:,} "
                    "held-out queries (pairs and demonstrations: on the method's own). A claim holds when the 95% "
                    "interval of its gain lies above 0, fails when it lies below, and is within noise otherwise.",
                )
            ],
        ),
        Section("Does the rule of thumb hold?", _rule_of_thumb(material, gold)),
        Section("Are the pairs right?", _pairs(gold)),
        Section("Does the reward model see quality, or length?", _reward(gold)),
        Section("Is the guidance worth it?", _guidance(gold)),
        Section("Do the policies improve?", _policies(gold)),
        Section("Does RLSF over-optimise?", _curve(material, gold)),
    ]


def _instead(material: Material) -> str:
    if material.scores is None:
        return ""
    steps = material.scores["steps"]
    parts = []
    for name, gains in steps.items():
        better, worse = (tables.POLICY_NAMES[one] for one in name.split(" - "))
        gain = gains["reward"]
        parts.append(f"{better} over {worse} {gain['difference']:+.2f} ({tables.span(gain['ci95'], '+.2f')})")
    return f"; by the reward model: {', '.join(parts)}" if parts else ""


def _labels(material: Material) -> dict[str, str]:
    configurations = (material.config.get("comparisons") or {}).get("configurations") or {}
    return {
        name: f"{name}: {entry['model']}, {str(entry['demonstrations']).rsplit(':', 1)[-1]}, {entry['shots']}-shot"
        for name, entry in configurations.items()
    }


def _rule_of_thumb(material: Material, gold: Mapping[str, Any]) -> list[Block]:
    labels = _labels(material)
    n = max(figure["n"] for figure in gold["configurations"].values())
    return [
        FigureBlock(
            "configurations",
            plots.configurations(gold, labels),
            f"Mean gold score of fresh responses of each configuration to n = {n:,} held-out queries, in the order in "
            f"which the rule of thumb ranks them. {INTERVALS}",
        )
    ]


def _pairs(gold: Mapping[str, Any]) -> list[Block]:
    raw = gold["pairs"]["raw"]["kept"]
    return [
        FigureBlock(
            "filters",
            plots.filters(gold),
            f"Synthetic comparisons before and after post-validation, n = {raw:,} pairs. Left: pairs kept. Right: "
            f"share of the kept pairs whose chosen response has the higher gold score, ties counting half. {INTERVALS}",
        ),
        TableBlock(
            tables.filters_table(gold),
            "The same with its confounds. “Length-matched” weighs pairs so that preferring the longer response would "
            "score 0.5; “chosen is longer” is the share of kept pairs in which it is; ties are equal gold scores.",
        ),
    ]


def _reward(gold: Mapping[str, Any]) -> list[Block]:
    details = {name: gold["reward_model_details"][name] for name in tables.SCORER_NAMES}
    n = max((detail["n"] for detail in details.values() if detail), default=0)
    blocks: list[Block] = [
        TableBlock(
            tables.means_table("scorer", details, tables.SCORER_NAMES, "accuracy"),
            f"How often each scorer prefers the really better of two responses to one held-out query, n = {n:,} pairs "
            "of different gold score, from all configurations. Length-matched: pairs weighed so that “the longer one "
            "wins” would score 0.5; n is then the effective number of pairs.",
        )
    ]
    figure = plots.score_by_length(gold["by_length"])
    if figure is not None:
        n = sum(group["n"] for group in gold["by_length"]["bins"])
        blocks.append(
            FigureBlock(
                "score_by_length",
                figure,
                f"Mean score against length of response, n = {n:,} held-out responses of all configurations in bins of "
                "nearly equal size; r is the correlation over responses. A reward model that sees quality follows the "
                "gold score's curve, one that sees length only rises.",
            )
        )
    return blocks


def _guidance(gold: Mapping[str, Any]) -> list[Block]:
    names = {
        name: f"best of {name.removeprefix('oracle_')}, by gold score"
        if name.startswith("oracle")
        else "first sample"
        if name == "1"
        else f"best of {name}, by reward model"
        for name in gold["best_of_n_details"]
    }
    blocks: list[Block] = [
        TableBlock(
            tables.means_table("choice", gold["best_of_n_details"], names, "gold score"),
            "Choosing among samples of the demonstrations' assistant on held-out queries: what the reward model's "
            "choice gains over taking the first sample, and what a perfect choice would.",
        )
    ]
    if gold["demonstrations"]:
        left_out = ", ".join(
            f"{figure['unscored']:,} of {tables.SOURCE_NAMES.get(name, name)}"
            for name, figure in gold["demonstrations"].items()
        )
        blocks.append(
            TableBlock(
                tables.means_table("demonstrations", gold["demonstrations"], tables.SOURCE_NAMES, "gold score"),
                "The demonstrations that the policies are trained on: mean gold score of the assistant's turns. Turns "
                f"that answer no question of the micro-world can't be judged and are left out ({left_out}).",
            )
        )
    return blocks


def _policies(gold: Mapping[str, Any]) -> list[Block]:
    if not gold["policies"]:
        return []
    n = max(figure["n"] for figure in gold["policies"].values())
    lengths = ", ".join(
        f"{tables.POLICY_NAMES[name]} {gold['lengths'][f'policy/{name}']['characters']:.0f}"
        for name in POLICIES
        if f"policy/{name}" in gold["lengths"]
    )
    blocks: list[Block] = [
        FigureBlock(
            "policies",
            plots.policies(gold),
            f"Mean gold score of the policies on n = {n:,} held-out queries, in the order of the method. {INTERVALS} "
            f"Mean lengths in characters: {lengths}.",
        ),
        TableBlock(
            tables.kinds_table(gold["by_kind"]),
            "The same by kind of query; n is the number of queries of the kind.",
        ),
    ]
    if gold.get("rivals"):
        text = "What else can be made of the SFT policy and the same synthetic pairs, on the same queries."
        blocks.append(TableBlock(tables.rivals_table(gold), text))
    return blocks


def _curve(material: Material, gold: Mapping[str, Any]) -> list[Block]:
    curves = scored.named_curves(material.config, gold)
    figure = plots.over_optimisation(curves)
    if figure is None:
        return []
    n = gold["rlsf_curve"][-1]["n"]
    return [
        FigureBlock(
            "over_optimisation",
            figure,
            "Scores of PPO's policies against their KL from the SFT policy, measured on "
            f"n = {n:,} held-out queries at every kept step; the line follows training. Where the reward still rises "
            f"and the gold score falls, the reward model is being over-optimised. {INTERVALS}",
        ),
        *scored.selection(curves, gold),
    ]


def _comparisons(material: Material) -> list[Block]:
    """Without gold scores: what the filters did."""
    path = material.directory / "comparisons.jsonl"
    if not path.exists():
        return []
    counts = Counter(record["dropped_by"] or "kept" for record in iter_records(path))
    rows = [
        (name.replace("_", " "), f"{count:,}", f"{count / counts.total():.1%}") for name, count in counts.most_common()
    ]
    caption = f"What became of n = {counts.total():,} synthetic comparisons: kept, or the filter that dropped them."
    table = TableBlock(Table(("pairs", "count", "share"), rows, (1, 2)), caption)
    return [table, *scored.filter_stages(iter_records(path))]


def _ablation(material: Material) -> list[Block]:
    """The reward model learned from each set of pairs: by the gold score where there is one, and by the pairs."""
    found = load_json(material.directory / "reward_ablation" / "ablation.json")
    if found is None:
        return []
    same = (
        f"Reward models of the same start and {found['steps']:,} steps, learned from all pairs and from those that "
        "each filter leaves; the gain is over the model of the row above."
    )
    blocks: list[Block] = []
    by_gold = (found["by_gold"] or {}).get("raw")
    if by_gold:
        n = by_gold["longer_wins"]["n"]
        caption = (
            f"{same} Right is the response with the higher gold score, on n = {n:,} held-out pairs before any filter."
        )
        blocks.append(TableBlock(tables.ablation_table(by_gold, found["models"]), f"{caption} {INTERVALS}"))
    for name, figures in reversed(found["held_out"].items()):
        n = figures["longer_wins"]["n"]
        which = {"raw": "before any filter", "heuristic": "after the heuristic filter", "as_is": "after both filters"}
        caption = (
            f"Right is the pair's chosen response, by the rule of thumb, on n = {n:,} held-out pairs {which[name]}."
        )
        if not blocks:
            caption = f"{same} {caption}"
        if name != "raw":
            caption += " These pairs were chosen as those of the last models were, which favours them."
        blocks.append(TableBlock(tables.ablation_table(figures, found["models"]), f"{caption} {INTERVALS}"))
    return blocks


def _dialogues(material: Material) -> list[Block]:
    """Held-out queries with every policy's response, one of each kind where there are kinds; else samples of RLSF."""
    if material.gold is None and material.items:
        return scored.policy_samples(material.items)
    by_query: dict[str, dict[str, Record]] = {}
    for item in material.items:
        if item["system"].startswith("policy/"):
            by_query.setdefault(item["query_id"], {})[item["system"].removeprefix("policy/")] = item
    firsts: dict[str, dict[str, Record]] = {}
    for group in by_query.values():
        firsts.setdefault(next(iter(group.values()))["kind"], group)
    if firsts:
        blocks: list[Block] = ["The first held-out query of each kind, not picked for its outcome."]
        for kind, group in sorted(firsts.items())[:SAMPLES_SHOWN]:
            replies = [
                (tables.POLICY_NAMES[name], group[name]["text"], f"gold {group[name]['gold']:.2f}")
                for name in POLICIES
                if name in group
            ]
            blocks.append(Dialogue(next(iter(group.values()))["query"], kind.replace("_", " "), replies))
        return blocks
    path = material.directory / "rlsf" / "rollouts.jsonl"
    samples = read_records(path) if path.exists() else []
    last = max((sample["step"] for sample in samples), default=0)
    return [
        Dialogue(sample["query"], f"step {last}", [("RLSF", sample["response"], tables.rollout_note(sample))])
        for sample in [sample for sample in samples if sample["step"] == last][:SAMPLES_SHOWN]
    ]


def _self_play(material: Material) -> list[Block]:
    path = material.directory / "demonstrations.jsonl"
    return scored.self_play_samples(read_records(path)) if path.exists() else []


def _training(material: Material) -> list[Block]:
    files = {stage: load_json(material.directory / stage / "evaluation.json") for stage in ("as_is_reward", "reward")}
    judged = {STAGE_NAMES[stage]: found for stage, found in files.items() if found and "length_only" in found}
    blocks: list[Block] = []
    if judged:
        blocks.append(
            TableBlock(
                tables.reward_models_table(judged),
                "Reward models on pairs held out from their own training, whose labels are the rule of thumb's or the "
                "votes'. The correlation is that of score and length differences within pairs; the warning says that "
                "it is high and that the length-matched accuracy can't be told from chance.",
            )
        )
    for stage, fields in CURVES.items():
        path = material.directory / stage / "metrics.jsonl"
        figure = plots.training_curves(read_records(path), fields) if path.exists() else None
        if figure is not None:
            blocks.append(FigureBlock(f"training_{stage}", figure, f"Training of {STAGE_NAMES[stage]}, by update."))
    return blocks


def _definitions(material: Material) -> list[Block]:
    figures = material.scores if material.gold is None else material.gold
    if figures is None:
        return []
    bootstrap, contamination = figures["bootstrap"], figures["contamination"]
    rows = [(name.replace("_", " "), text) for name, text in figures.get("definitions", DEFINITIONS).items()]
    found = ", ".join(f"{count} in {place}" for place, count in contamination.items() if count)
    return [
        TableBlock(
            Table(("figure", "definition"), rows, ()), f"Definitions; {bootstrap['samples']:,} bootstrap samples."
        ),
        f"Held-out queries that also stand in what the method trained on: {found or 'none'}.",
    ]


def _provenance(material: Material) -> list[Block]:
    # The report itself is still running while it is written.
    stages = material.status.get("stages", {}).items()
    entries = {name: entry for name, entry in stages if "fingerprint" in entry and name != "report"}
    blocks: list[Block] = []
    if entries:
        rows = [(name, entry["state"], f"{entry['seconds']:,.0f}") for name, entry in entries.items()]
        blocks.append(TableBlock(Table(("stage", "state", "seconds"), rows, (2,)), "The stages of this run."))
    software: dict[str, dict[str, None]] = {}  # name -> its versions; more than one when the run was continued
    for entry in entries.values():
        for name, version in {**entry.get("versions", {}), "commit": entry.get("commit")}.items():
            if version is not None:
                software.setdefault(name, {})[version] = None
    if software:
        blocks.append("; ".join(f"{name} {', '.join(found)}" for name, found in software.items()) + ".")
    blocks.append(Listing("config.yaml", material.config_text))
    return blocks
