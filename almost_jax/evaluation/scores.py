"""What can be said of each step where nothing knows how good a response is: by the reward models, and by length.

The reward model chose the demonstrations and PPO aims at it, so its scores show what the method did, not whether that
was right. The as-is reward model is a second opinion, and length stands beside every figure. Records in, figures out.
Source: the analyses of ALMoST (arXiv 2305.13735), section 4.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from almost_jax.evaluation.analyses import (
    CURVES,
    POLICIES,
    RIVALS,
    Item,
    beside_rlsf,
    by_length,
    collect,
    compare,
    gains_of,
    length_matched,
    of_system,
    over_optimisation,
    response_lengths,
    selected,
)
from almost_jax.evaluation.statistics import Bootstrap, agreement, clusters, paired_intercept, share_interval

MEASURES = ("reward", "as_is")
SOURCES = ("self_play", "reward_guided")

DEFINITIONS = {
    "ci95": "95% percentile bootstrap over queries; differences resample the queries of both sides together; a share "
    "on which all queries agree has Clopper and Pearson's exact interval",
    "reward, as-is reward": "normalised: 0 is the mean and 1 the standard deviation over the reward model's reference "
    "samples",
    "at equal length": "the part of a gain that length does not explain: the intercept of a least-squares line through "
    "the queries' differences in score against their differences in characters; where lengths hardly overlap it is an "
    "extrapolation, and its interval wide",
    "rule of thumb": "share of queries to which the better configuration's response has the higher score; a tie "
    "counts half",
    "length-matched": "the same with length taken out: among pairs of like difference in characters, those whose "
    "better configuration's response is the longer one and those whose is the shorter one weigh the same",
    "kl": "mean over responses of log policy - log SFT policy, summed over the response's tokens (nats)",
}


def analyse(
    items: Sequence[Item],
    played: Sequence[Item],
    configurations: Sequence[str],
    n: int,
    queries: Sequence[str],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """All figures.

    Args:
        items: scored responses to held-out queries, see `analyses`.
        played: scored assistant turns of the demonstrations, as items of the systems `self_play` and `reward_guided`.
        configurations: their names, best first.
        n: samples of `best_of_n`.
        queries: ids of the held-out queries.
        bootstrap: how intervals are drawn.

    Returns:
        "measures": the scores that were taken; "configurations", "policies", "demonstrations": {name: {measure:
        {"mean", "ci95", "n"}, "characters"}} with their gains over the next worse one in "gaps", "steps",
        "demonstration_gains": {"better - worse": {measure: {"difference", "ci95", "significant", "n",
        "at_equal_length"}}}; "rivals": {measure: as `analyses.beside_rlsf` has them}; "rungs", "best_of_n",
        "rlsf_curve", "over_optimised_curve", "selected", "by_length", "lengths".
    """
    measures = [field for field in MEASURES if items and all(item[field] is not None for item in items)]
    worst_first = {name: f"configuration/{name}" for name in reversed(configurations)}
    policies = {name: f"policy/{name}" for name in POLICIES}
    sources = {name: name for name in SOURCES}
    playing = sorted({item["query_id"] for item in played})
    played_measures = [field for field in measures if all(item[field] is not None for item in played)]
    found, gaps = _side_by_side(items, worst_first, measures, queries, bootstrap)
    means, steps = _side_by_side(items, policies, measures, queries, bootstrap)
    demonstrations, gains = _side_by_side(played, sources, played_measures, playing, bootstrap)
    curves = {name: over_optimisation(items, ("kl", *measures), queries, bootstrap, name) for name in CURVES}
    groups = {
        "configurations": [item for item in items if item["system"].startswith("configuration/")],
        "policies": [item for item in items if item["system"].startswith("policy/")],
        "demonstrations": list(played),
    }
    return {
        "measures": measures,
        "configurations": {name: found[name] for name in configurations if name in found},
        "gaps": dict(reversed(gaps.items())),
        "rungs": rungs(groups["configurations"], configurations, measures, queries, bootstrap),
        "best_of_n": choice_of_n(of_system(items, "best_of_n"), n, measures, queries, bootstrap),
        "demonstrations": demonstrations,
        "demonstration_gains": gains,
        "policies": means,
        "steps": steps,
        "rivals": {
            measure: beside_rlsf(groups["policies"], queries, bootstrap, measure, rivals)
            for measure in measures
            # The reward model's choice isn't judged by the reward model.
            for rivals in [RIVALS if measure != "reward" else ("dpo",)]
        },
        "rlsf_curve": curves["curve"],
        "over_optimised_curve": curves["over_optimised"],
        "selected": {CURVES[name]: selected(curve) for name, curve in curves.items() if curve},
        "by_length": {name: by_length(group) for name, group in groups.items() if group},
        "lengths": response_lengths(items),
        "definitions": DEFINITIONS,
        "bootstrap": {"samples": bootstrap.samples, "seed": bootstrap.seed},
    }


def rungs(
    items: Sequence[Item],
    configurations: Sequence[str],
    measures: Sequence[str],
    queries: Sequence[str],
    bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:
    """How often the rule of thumb agrees with each score, rung by rung.

    Args:
        items: one scored response of every configuration to each query.
        configurations: their names, best first; neighbours are a rung.
        measures: the scores to ask.
        queries: every query id.
        bootstrap: how intervals are drawn.

    Returns:
        {"A over B": {"longer": share of queries where A's response is the longer one, measure: {"mean", "ci95", "n",
        "length_matched"}}}, for rungs with items on both sides.
    """
    by_system = {name: {i["query_id"]: i for i in of_system(items, f"configuration/{name}")} for name in configurations}
    found: dict[str, dict[str, Any]] = {}
    for better, worse in itertools.pairwise(configurations):
        sides = by_system[better], by_system[worse]
        pairs = [(query, sides[0][query], sides[1][query]) for query in sides[0] if query in sides[1]]
        if not pairs:
            continue
        gaps = [len(first["text"]) - len(second["text"]) for _, first, second in pairs]
        rung: dict[str, Any] = {"longer": float(np.mean([agreement(gap, 1.0) for gap in gaps]))}
        for measure in measures:
            right = [agreement(first[measure] - second[measure], 1.0) for _, first, second in pairs]
            rows = [(pair[0], hit, float(gap)) for pair, hit, gap in zip(pairs, right, gaps, strict=True)]
            share = clusters({query: [hit] for query, hit, _ in rows}, queries)
            rung[measure] = {
                **share_interval(share, bootstrap),
                "length_matched": length_matched(rows, queries, bootstrap),
            }
        found[f"{better} over {worse}"] = rung
    return found


def choice_of_n(
    items: Sequence[Item], n: int, measures: Sequence[str], queries: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """The first of n samples and the reward model's choice among them, by every score; ties go to the earlier sample.

    Returns:
        As `analyse` has them: {"1", str(n): {measure: ..., "characters"}} and, under "gains", the gain of the choice.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item["query_id"], []).append(item)
    taken: list[Item] = []
    for group in groups.values():
        group = sorted(group, key=lambda item: item["sample"])
        choice = max(group, key=lambda item: (item["reward"], -item["sample"]))
        taken += [{**group[0], "system": "1"}, {**choice, "system": str(n)}]
    means, gains = _side_by_side(taken, {"1": "1", str(n): str(n)}, measures, queries, bootstrap)
    return {**means, "gains": gains}


def _side_by_side(
    items: Sequence[Item],
    systems: Mapping[str, str],
    measures: Sequence[str],
    queries: Sequence[str],
    bootstrap: Bootstrap,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every score and the length of each system, worst first, and the gains of each over the one before it."""
    groups = {name: of_system(items, system) for name, system in systems.items()}
    groups = {name: group for name, group in groups.items() if group}
    means: dict[str, Any] = {name: {} for name in groups}
    gains: dict[str, Any] = {f"{better} - {worse}": {} for worse, better in itertools.pairwise(groups)}
    for measure in measures:
        found, _ = compare(items, systems, measure, queries, bootstrap)
        for name, figure in found.items():
            means[name][measure] = figure
        sums = {name: clusters(collect(group, measure), queries) for name, group in groups.items()}
        for name, gain in gains_of(sums, bootstrap).items():
            better, worse = name.split(" - ")
            level = paired_intercept(*_paired(groups[better], groups[worse], measure), bootstrap)
            gains[name][measure] = {**gain, "at_equal_length": level}
    for name, group in groups.items():
        means[name]["characters"] = float(np.mean([len(item["text"]) for item in group]))
    return means, gains


def _paired(better: Sequence[Item], worse: Sequence[Item], measure: str) -> tuple[list[float], list[float]]:
    """Per query that both answer: the difference of their mean scores, and that of their mean lengths."""
    scores = [collect(side, measure) for side in (better, worse)]
    lengths = [_lengths(side) for side in (better, worse)]
    both = [query for query in scores[0] if query in scores[1]]

    def differences(sides: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
        return [float(np.mean(sides[0][query]) - np.mean(sides[1][query])) for query in both]

    return differences(scores), differences(lengths)


def _lengths(items: Sequence[Item]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for item in items:
        found.setdefault(item["query_id"], []).append(float(len(item["text"])))
    return found
