"""The figures that the micro-world's gold score allows: whether each step did what the paper claims.

This is the only module of the pipeline that reads the gold score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from almost_jax.errors import InputError
from almost_jax.evaluation import analyses
from almost_jax.evaluation.analyses import Item
from almost_jax.evaluation.held_out import Truth
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.records import Record, read_records
from almost_jax.io.run import Run
from almost_jax.microworld.gold import gold_score, kind

OTHER = "other"  # the gold score's name for a query that isn't one of its world's
POLICY_SYSTEMS = {name: f"policy/{name}" for name in analyses.POLICIES}
TRUTH = Truth(gold_score, kind)


def analyse(run: Run, queries: Sequence[Record], items: Sequence[Item]) -> dict[str, Any]:
    """All the figures of gold.json, from records alone."""
    config = run.config
    bootstrap = Bootstrap(config.evaluation.bootstrap_samples, run.seed("evaluation/bootstrap"))
    ids = [query["id"] for query in queries]
    names = list(config.comparisons.configurations)
    of_configurations = [item for item in items if item["system"].startswith("configuration/")]
    # compare() goes from worst to best, configurations are listed best first.
    worst_first = {name: f"configuration/{name}" for name in reversed(names)}
    configurations, gaps = analyses.compare(items, worst_first, "gold", ids, bootstrap)
    policies, steps = analyses.compare(items, POLICY_SYSTEMS, "gold", ids, bootstrap)
    texts = {query["id"]: query["text"] for query in read_records(run.path("queries.jsonl"))}
    comparisons = read_records(run.path("comparisons.jsonl"))
    strangers = [record["query_id"] for record in comparisons if record["query_id"] not in texts]
    if strangers:
        raise InputError(f"{run.path('comparisons.jsonl')}: query_id {strangers[0]!r} is not in queries.jsonl")
    sources = {"self_play": "demonstrations_self_play.jsonl", "reward_guided": "demonstrations.jsonl"}
    played = {name: read_records(run.path(file)) for name, file in sources.items() if run.exists(file)}
    kept, fields = ids[: config.evaluation.curve_queries], ("kl", "reward", "as_is", "gold")
    curves = {
        name: analyses.over_optimisation(items, fields, kept, bootstrap, name) for name in analyses.CURVES
    }
    policy_items = [item for item in items if item["system"].startswith("policy/")]
    return {
        "configurations": {name: configurations[name] for name in names},
        "gaps": dict(reversed(gaps.items())),
        **analyses.pair_quality(comparisons, lambda query_id, text: gold_score(texts[query_id], text), bootstrap),
        **analyses.reward_accuracy(of_configurations, ids, bootstrap),
        **analyses.best_of_n(analyses.of_system(items, "best_of_n"), config.evaluation.best_of, ids, bootstrap),
        **analyses.demonstration_quality(played, gold_score, lambda text: kind(text) != OTHER, bootstrap),
        "policies": policies,
        "steps": steps,
        **analyses.beside_rlsf(policy_items, ids, bootstrap),
        "rlsf_curve": curves["curve"],
        "over_optimised_curve": curves["over_optimised"],
        "selected": {analyses.CURVES[name]: analyses.selected(curve) for name, curve in curves.items() if curve},
        "by_kind": analyses.by_kind(
            [*of_configurations, *(item for item in policy_items if item["system"] != "policy/sft_best_of_n")]
        ),
        "by_length": analyses.by_length(of_configurations),
        "lengths": analyses.response_lengths(items),
        "definitions": analyses.DEFINITIONS,
        "bootstrap": {"samples": bootstrap.samples, "seed": bootstrap.seed},
    }


def analyse_ablation(
    queries: Mapping[str, str], records: Sequence[Record], bootstrap: Bootstrap
) -> dict[str, Any]:
    """`analyses.ablation_figures` by the gold score.

    Args:
        queries: texts by id.
        records: of reward_ablation/scores.jsonl.
        bootstrap: how intervals are drawn.
    """

    def gap(record: Mapping[str, Any]) -> float:
        query = queries[record["query_id"]]
        return gold_score(query, record["chosen"]) - gold_score(query, record["rejected"])

    return analyses.ablation_figures(records, gap, bootstrap)
