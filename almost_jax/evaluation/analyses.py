"""What the scored responses say about each step of the method. Records in, figures out: no models, no files.

An item is one scored response of a held-out query:
{"query_id", "query", "kind", "system", "sample", "text", "finish", "gold", "reward", "as_is", "kl"}; a score that
wasn't taken is None. Systems are named `configuration/A`, `best_of_n`, `policy/sft`, `curve/20` (the RLSF policy after
20 steps), `over_optimised/20` (the same with too weak a KL penalty).
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from almost_jax.evaluation.statistics import (
    Bootstrap,
    Clusters,
    agreement,
    clusters,
    correlation,
    difference,
    interval,
    quantile_bins,
    share_interval,
    weighted_clusters,
)
from almost_jax.sampling.selection import best_of
from almost_jax.stages.pair_figures import GAP_EDGES

Item = dict[str, Any]
Scores = dict[str, list[float]]

POLICIES = ("prompted", "sft_self_play", "sft", "rlsf")
# What else can be made of the SFT policy and the synthetic pairs, beside RLSF: without a reward model and rollouts, and
# without training at all.
RIVALS = ("dpo", "sft_best_of_n")
# Policies kept along PPO, as systems `NAME/STEP`, and the folder of the stage that kept them.
CURVES = {"curve": "rlsf", "over_optimised": "over_optimisation"}
_HEURISTIC = ("empty", "identical", "keyword", "length")
# What has dropped a pair (`dropped_by`) that is no longer there after each filter.
AFTER_FILTERS: Mapping[str, tuple[str, ...]] = {
    "raw": (),
    "heuristic": _HEURISTIC,
    "as_is": (*_HEURISTIC, "as_is_reward"),
}
LENGTH_BINS = 10

DEFINITIONS = {
    "ci95": "95% percentile bootstrap over queries; differences resample the queries of both sides together; a share "
    "on which all queries agree has Clopper and Pearson's exact interval",
    "significant": "the interval of the difference leaves out 0",
    "pairs": "share of the kept pairs of comparisons.jsonl whose chosen response has the higher gold score; "
    "a tie counts half",
    "reward_model": "share of pairs of responses of the configurations to one held-out query, of different gold score, "
    "in which the scorer prefers the one with the higher gold score; a tie of the scorer counts half",
    "length_matched_accuracy": "the same with length taken out: among pairs of like difference in characters, those "
    "whose better response is the longer one and those whose better response is the shorter one weigh the same (each "
    "side as much as the smaller of the two); preferring the longer gives exactly 0.5",
    "best_of_n": "mean gold score of the first sample, of the reward model's choice among the samples, and of the best "
    "sample",
    "sft_best_of_n": "the reward model's choice among samples of the SFT policy, one choice per query",
    "kl": "mean over responses of log policy - log SFT policy, summed over the response's tokens (nats)",
}


def collect(items: Iterable[Item], field: str) -> Scores:
    """The values of one field by query id, in the order of the items."""
    scores: Scores = {}
    for item in items:
        scores.setdefault(item["query_id"], []).append(item[field])
    return scores


def of_system(items: Iterable[Item], system: str) -> list[Item]:
    """The items of one system."""
    return [item for item in items if item["system"] == system]


def compare(
    items: Sequence[Item], systems: Mapping[str, str], field: str, queries: Sequence[str], bootstrap: Bootstrap
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean score of each system, and the gain of each over the one before it.

    Args:
        items: scored responses.
        systems: shown name -> name of the system in the items, worst first; those without items are left out.
        field: the score: "gold", "reward" or "as_is".
        queries: ids of the held-out queries.
        bootstrap: how intervals are drawn.

    Returns:
        {name: {"mean", "ci95", "n"}} and {"better - worse": {"difference", "ci95", "significant", "n"}}.
    """
    sums = {name: clusters(collect(of_system(items, system), field), queries) for name, system in systems.items()}
    sums = {name: quantity for name, quantity in sums.items() if quantity.n}
    return {name: interval(quantity, bootstrap) for name, quantity in sums.items()}, gains_of(sums, bootstrap)


def pair_quality(
    comparisons: Sequence[Mapping[str, Any]], score: Callable[[str, str], float], bootstrap: Bootstrap
) -> dict[str, Any]:
    """How often the chosen response really is better: all pairs, after the heuristic filter, after the as-is filter.

    Args:
        comparisons: records of comparisons.jsonl.
        score: (query id, response text) -> gold score.
        bootstrap: how intervals are drawn.

    Returns:
        "pairs": {filter: {"kept", "accuracy", "ties"}} (a tie of gold counts half; accuracy is None when no pair is
        kept), "pair_gains" of each filter over the one before, and "pair_details": the accuracy with its interval, also
        with length taken out, and the share of pairs whose chosen response is the longer one.
    """
    rows = []
    for record in comparisons:
        chosen, rejected, dropped = record["chosen"], record["rejected"], record["dropped_by"]
        margin = score(record["query_id"], chosen["text"]) - score(record["query_id"], rejected["text"])
        longer = len(chosen["text"]) - len(rejected["text"])
        rows.append((record["query_id"], dropped, margin, longer))
    queries = sorted({row[0] for row in rows})
    pairs: dict[str, Any] = {}
    details: dict[str, Any] = {}
    sums: dict[str, Clusters] = {}
    for name, dropping in AFTER_FILTERS.items():
        kept = [row for row in rows if row[1] not in dropping]
        scores: Scores = {}
        for query, _, margin, _ in kept:
            scores.setdefault(query, []).append(agreement(margin, 1.0))
        sums[name] = clusters(scores, queries)
        pairs[name] = {
            "kept": len(kept),
            "accuracy": sums[name].mean if kept else None,
            "ties": sum(row[2] == 0 for row in kept),
        }
        details[name] = {
            "accuracy": share_interval(sums[name], bootstrap) if kept else None,
            "chosen_is_longer": float(np.mean([agreement(row[3], 1.0) for row in kept])) if kept else None,
            "length_matched_accuracy": length_matched(
                [(row[0], agreement(row[2], 1.0), row[3] * np.sign(row[2])) for row in kept if row[2] != 0],
                queries,
                bootstrap,
            ),
        }
    return {"pairs": pairs, "pair_gains": gains_of(sums, bootstrap), "pair_details": details}


def length_matched(
    rows: Sequence[tuple[str, float, float]], queries: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Accuracy with length taken out of the question, as `stages.pair_figures.length_matched_accuracy` defines it.

    Args:
        rows: (query id, 1 / 0.5 / 0 for a right / undecided / wrong preference, characters of the really better
            response less those of the worse).
        queries: every query id.
        bootstrap: how the interval is drawn; the weights of pairs stay those of the whole sample.

    Returns:
        {"mean", "ci95", "n"}, n being the pairs that could be matched; None when there are none.
    """
    gaps = np.array([gap for _, _, gap in rows])
    strata = np.digitize(np.abs(gaps), GAP_EDGES)
    weights = np.where(gaps == 0, 1.0, 0.0)
    for stratum in np.unique(strata[gaps != 0]):
        sides = [(strata == stratum) & (gaps > 0), (strata == stratum) & (gaps < 0)]
        for side in sides:
            if side.any():
                weights[side] = min(int(side.sum()) for side in sides) / int(side.sum())
    matched = weighted_clusters(
        [(query, float(weight), right) for (query, right, _), weight in zip(rows, weights, strict=True)], queries
    )
    return share_interval(matched, bootstrap) if matched.n else None


def reward_accuracy(items: Sequence[Item], queries: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
    """How often the reward model, its rivals and itself on length-matched pairs prefer the really better response.

    Args:
        items: responses of the configurations to held-out queries; each two of one query with different gold scores
            make a pair.
        queries: ids of the held-out queries.
        bootstrap: how intervals are drawn.

    Returns:
        "reward_model": {"accuracy", "length_matched_accuracy", "longer_wins_accuracy", "as_is_accuracy"} (None where
        there is nothing to count), "reward_model_details" with an interval each, and "reward_model_gains" over each
        rival. See DEFINITIONS.
    """
    names = ("accuracy", "longer_wins_accuracy", "as_is_accuracy")
    scores: dict[str, Scores] = {name: {} for name in names}
    by_gap = []
    for query, group in _by_query(items).items():
        for first, second in itertools.combinations(group, 2):
            truth = first["gold"] - second["gold"]
            if truth == 0:
                continue
            right = agreement(first["reward"] - second["reward"], truth)
            longer = len(first["text"]) - len(second["text"])
            scores["accuracy"].setdefault(query, []).append(right)
            scores["longer_wins_accuracy"].setdefault(query, []).append(agreement(longer, truth))
            by_gap.append((query, right, float(longer * np.sign(truth))))
            if first["as_is"] is not None:
                as_is = agreement(first["as_is"] - second["as_is"], truth)
                scores["as_is_accuracy"].setdefault(query, []).append(as_is)
    sums = {name: clusters(scores[name], queries) for name in names}
    details = {name: share_interval(sums[name], bootstrap) if sums[name].n else None for name in names}
    details["length_matched_accuracy"] = length_matched(by_gap, queries, bootstrap)
    gains = {
        f"accuracy - {rival}": difference(sums["accuracy"], sums[rival], bootstrap)
        for rival in ("longer_wins_accuracy", "as_is_accuracy")
        if sums[rival].n
    }
    order = ("accuracy", "length_matched_accuracy", "longer_wins_accuracy", "as_is_accuracy")
    return {
        "reward_model": {name: figure["mean"] if (figure := details[name]) else None for name in order},
        "reward_model_gains": gains,
        "reward_model_details": {name: details[name] for name in order},
    }


def ablation_figures(
    records: Sequence[Mapping[str, Any]], truth: Callable[[Mapping[str, Any]], float], bootstrap: Bootstrap
) -> dict[str, Any]:
    """How often the reward models of different sets of pairs prefer the better response, on held-out pairs.

    Args:
        records: of reward_ablation/scores.jsonl.
        truth: a record -> above 0 where the chosen response is better, below where the rejected one is; pairs with 0
            are left out.
        bootstrap: how intervals are drawn.

    Returns:
        {set of held-out pairs: {"accuracy": {set that a model learned from: {"mean", "ci95", "n"}}, "gains" of each
        model over the one before, "length_matched": {...} with length taken out (None where nothing can be matched),
        "longer_wins": {"mean", "ci95", "n"}}}; a set without pairs is left out.
    """
    queries = sorted({record["query_id"] for record in records})
    judged = [(record, value) for record in records if (value := truth(record)) != 0]
    found: dict[str, Any] = {}
    for name in AFTER_FILTERS:
        rows = [(record, value) for record, value in judged if name in record["sets"]]
        if not rows:
            continue
        ids = [record["query_id"] for record, _ in rows]
        # Characters of the better response less those of the other.
        gaps = [float(np.sign(value)) * (len(record["chosen"]) - len(record["rejected"])) for record, value in rows]
        right = {
            model: [agreement(record["margins"][model], value) for record, value in rows]
            for model in rows[0][0]["margins"]
        }
        sums = {
            model: weighted_clusters([(query, 1.0, hit) for query, hit in zip(ids, hits, strict=True)], queries)
            for model, hits in right.items()
        }
        longer = [(query, 1.0, agreement(gap, 1.0)) for query, gap in zip(ids, gaps, strict=True)]
        found[name] = {
            "accuracy": {model: share_interval(quantity, bootstrap) for model, quantity in sums.items()},
            "gains": gains_of(sums, bootstrap),
            "length_matched": {
                model: length_matched(list(zip(ids, hits, gaps, strict=True)), queries, bootstrap)
                for model, hits in right.items()
            },
            "longer_wins": share_interval(weighted_clusters(longer, queries), bootstrap),
        }
    return found


def beside_rlsf(
    items: Sequence[Item],
    queries: Sequence[str],
    bootstrap: Bootstrap,
    measure: str = "gold",
    rivals: Sequence[str] = RIVALS,
) -> dict[str, Any]:
    """RLSF beside its rivals on the same pairs and prompts.

    Args:
        items: of the systems `policy/sft`, `policy/rlsf` and those of `rivals` that were sampled; where there are
            several samples of a query, the reward model's choice counts.
        queries: ids of the held-out queries.
        bootstrap: how intervals are drawn.
        measure: the score by which they are compared.
        rivals: their names.

    Returns:
        "rivals": {name: {"mean", "ci95", "n", "characters"}} with sft and rlsf among them, and "rival_gains": each over
        sft, and rlsf over each, as "better - worse".
    """
    chosen = {name: _choices(of_system(items, f"policy/{name}")) for name in ("sft", *rivals, "rlsf")}
    sums = {name: clusters(collect(group, measure), queries) for name, group in chosen.items() if group}
    gains = [(name, "sft") for name in sums if name != "sft"] + [("rlsf", name) for name in rivals]
    return {
        "rivals": {
            name: {
                **interval(quantity, bootstrap),
                "characters": float(np.mean([len(item["text"]) for item in chosen[name]])),
            }
            for name, quantity in sums.items()
        },
        "rival_gains": {
            f"{better} - {worse}": difference(sums[better], sums[worse], bootstrap)
            for better, worse in gains
            if better in sums and worse in sums
        },
    }


def _choices(items: Sequence[Item]) -> list[Item]:
    """The reward model's choice among each query's samples, the same in any order of them."""
    return [group[_best(group)] for group in _by_query(items).values()]


def _best(group: Sequence[Item]) -> int:
    return best_of([item["text"] for item in group], [item["reward"] for item in group])


def best_of_n(items: Sequence[Item], n: int, queries: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
    """What choosing among n samples is worth: the first one, the reward model's choice, the best there is.

    Of equal rewards the text that sorts first is chosen.

    Returns:
        "best_of_n": {"1", str(n), f"oracle_{n}"} means, "best_of_n_details" with intervals, "best_of_n_gains".
    """
    chosen: dict[str, Scores] = {name: {} for name in dict.fromkeys(("1", str(n), f"oracle_{n}"))}
    for query, group in _by_query(items).items():
        group = sorted(group, key=lambda item: item["sample"])
        chosen[str(n)][query] = [group[_best(group)]["gold"]]
        chosen["1"][query] = [group[0]["gold"]]
        chosen[f"oracle_{n}"][query] = [max(item["gold"] for item in group)]
    sums = {name: clusters(scores, queries) for name, scores in chosen.items()}
    details = {name: interval(quantity, bootstrap) for name, quantity in sums.items()}
    return {
        "best_of_n": {name: figure["mean"] for name, figure in details.items()},
        "best_of_n_gains": gains_of(sums, bootstrap),
        "best_of_n_details": details,
    }


def demonstration_quality(
    sources: Mapping[str, Sequence[Mapping[str, Any]]],
    score: Callable[[str, str], float],
    in_world: Callable[[str], bool],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Mean gold score of the assistant's turns of each set of demonstrations, plain self-play first.

    Args:
        sources: name -> records of a demonstrations file, worse first.
        score: (what the human said, response text) -> gold score.
        in_world: whether the gold score can judge answers to a human turn; a simulated user may ask for nothing that
            the world knows, and such turns are counted in "unscored" and left out.
        bootstrap: how intervals are drawn.

    Returns:
        "demonstrations": {name: {"mean", "ci95", "n", "unscored", "characters"}} and "demonstration_gains".
    """
    scores: dict[str, Scores] = {name: {} for name in sources}
    unscored = dict.fromkeys(sources, 0)
    characters: dict[str, list[int]] = {name: [] for name in sources}
    for name, records in sources.items():
        for record in records:
            asked = ""
            for turn in record["turns"]:
                if turn["role"] == "human":
                    asked = turn["text"]
                elif in_world(asked):
                    scores[name].setdefault(record["query_id"], []).append(score(asked, turn["text"]))
                    characters[name].append(len(turn["text"]))
                else:
                    unscored[name] += 1
    queries = sorted({query for by_query in scores.values() for query in by_query})
    sums = {name: clusters(by_query, queries) for name, by_query in scores.items() if by_query}
    return {
        "demonstrations": {
            name: {
                **interval(quantity, bootstrap),
                "unscored": unscored[name],
                "characters": float(np.mean(characters[name])),
            }
            for name, quantity in sums.items()
        },
        "demonstration_gains": gains_of(sums, bootstrap),
    }


def over_optimisation(
    items: Sequence[Item],
    fields: Sequence[str],
    queries: Sequence[str],
    bootstrap: Bootstrap,
    name: str = "curve",
) -> list[dict[str, Any]]:
    """KL from the SFT policy and scores of every policy that PPO kept, by step.

    Args:
        items: of which those of the systems `NAME/STEP` count.
        fields: what to take the mean of: "kl", and the scores; one that wasn't taken of all items is left out.
        name: one of `CURVES`.
        queries: ids of the queries of the curve.
        bootstrap: how intervals are drawn.

    Returns:
        [{"step", each field, each field with "_ci95", "characters", "n"}].
    """
    items = [item for item in items if item["system"].startswith(f"{name}/")]
    fields = [field for field in fields if all(item[field] is not None for item in items)]
    curve = []
    for step in sorted({int(item["system"].removeprefix(f"{name}/")) for item in items}):
        group = of_system(items, f"{name}/{step}")
        figures = {field: interval(clusters(collect(group, field), queries), bootstrap) for field in fields}
        curve.append(
            {"step": step}
            | {field: figure["mean"] for field, figure in figures.items()}
            | {f"{field}_ci95": figure["ci95"] for field, figure in figures.items()}
            | {"characters": float(np.mean([len(item["text"]) for item in group])), "n": len(group)}
        )
    return curve


def selected(curve: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The step of a curve that each score would pick, by its mean on the held-out queries; the first of equal ones.

    A selection that PPO can't have spoiled is one by a score that it didn't climb.
    """
    scores = [field for field in ("reward", "as_is", "gold") if curve and field in curve[0]]
    return {score: int(max(curve, key=lambda point: point[score])["step"]) for score in scores}


def by_kind(items: Sequence[Item]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean gold score by system and kind of query: {system: {kind: {"mean", "n"}}}."""
    scores: dict[str, Scores] = {}
    for item in items:
        scores.setdefault(item["system"], {}).setdefault(item["kind"], []).append(item["gold"])
    return {
        system: {kind: {"mean": float(np.mean(group[kind])), "n": len(group[kind])} for kind in sorted(group)}
        for system, group in scores.items()
    }


def by_length(items: Sequence[Item]) -> dict[str, Any]:
    """Scores against length in characters, over bins of nearly equal size, and the correlations with length.

    Returns:
        {"bins": [{"characters", "shortest", "longest", "n", "gold", "reward", "as_is"}], "correlation": {score: r}};
        scores that weren't taken are left out.
    """
    fields = [field for field in ("gold", "reward", "as_is") if items and items[0][field] is not None]
    lengths = [len(item["text"]) for item in items]
    bins = []
    for group in quantile_bins(lengths, LENGTH_BINS):
        inside = [lengths[index] for index in group]
        bins.append(
            {"characters": float(np.mean(inside)), "shortest": min(inside), "longest": max(inside), "n": len(inside)}
            | {field: float(np.mean([items[index][field] for index in group])) for field in fields}
        )
    return {
        "bins": bins,
        "correlation": {field: correlation(lengths, [item[field] for item in items]) for field in fields},
    }


def response_lengths(items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """Mean length in characters, and the share cut off by the token budget, by system."""
    systems = dict.fromkeys(item["system"] for item in items)
    return {
        system: {
            "characters": float(np.mean([len(item["text"]) for item in group])),
            "unfinished": float(np.mean([item["finish"] == "length" for item in group])),
        }
        for system, group in ((system, of_system(items, system)) for system in systems)
    }


def _by_query(items: Iterable[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item["query_id"], []).append(item)
    return groups


def gains_of(sums: Mapping[str, Clusters], bootstrap: Bootstrap) -> dict[str, Any]:
    """The difference of each quantity to the one before it, where both counted something."""
    names = [name for name, quantity in sums.items() if quantity.n]
    return {
        f"{better} - {worse}": difference(sums[better], sums[worse], bootstrap)
        for worse, better in zip(names, names[1:], strict=False)
    }
