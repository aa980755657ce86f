"""What post-validation is worth to the reward model: one learned from all pairs, and one from those after each filter.

All start from the same model with the same head and learn by the same number of steps; the pairs of the same queries
are held out from all. Source: ALMoST (arXiv 2305.13735), section 4, which compares raw pairs, those after the heuristic
filter, and those after the as-is reward model's as well.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from almost_jax.evaluation.analyses import AFTER_FILTERS, ablation_figures
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.records import Record, iter_records, read_records, write_bytes, write_records
from almost_jax.io.run import Run
from almost_jax.stages.dialogues import text_tokens
from almost_jax.stages.reward import (
    Pair,
    RewardScorer,
    check_any_kept,
    comparison_pair,
    load_reward_model,
    split_pairs,
    train_reward_model,
)
from almost_jax.stages.training import count_steps

NAME = "reward_ablation"


def run_stage(run: Run) -> dict[str, Any]:
    """Train on each set of pairs and compare: comparisons.jsonl -> reward_ablation/{ablation.json,scores.jsonl,SET/}.

    Does nothing when the experiment has no `reward_ablation:` section. A set from which a filter drops nothing is the
    one before it and is left out.

    scores.jsonl has every held-out pair: {"query_id", "chosen", "rejected" (texts), "sets" (those it is in), "margins"
    {set whose model: score of chosen minus rejected}}. ablation.json has the figures, see `ablation_figures`.

    Returns:
        {set: its model's accuracy on the held-out pairs that every filter kept}.

    Raises:
        InputError: no pair was kept, none is left to train on, or none fits.
        TrainingDiverged: a figure is not finite.
        Preempted: SIGTERM came; the state is saved.
    """
    settings = run.config.reward_ablation
    if settings is None:
        run.say(f"{NAME}: the experiment has no `{NAME}:` section, so this analysis is left out")
        return {NAME: "off"}
    config = run.config.reward
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    records = list(iter_records(run.path("comparisons.jsonl")))
    sets = _sets(queries, records)
    last = list(sets)[-1]
    check_any_kept(run, NAME, len(sets[last]))
    train, test = split_pairs(sets[last], settings.held_out, run.seed(f"{NAME}/split"))
    held_out = frozenset(pair.group for pair in test)
    steps = count_steps(config.training, len(train))
    if settings.max_steps:
        steps = min(steps, settings.max_steps)
    trained: dict[str, dict[str, Any]] = {}
    for name, pairs in sets.items():
        # All are watched on the pairs that every filter kept.
        summary = train_reward_model(
            run,
            f"{NAME}/{name}",
            config.model,
            [*(pair for pair in pairs if pair.group not in held_out), *test],
            held_out=held_out,
            reference_samples=config.reference_samples,
            margin=config.margin,
            centering=config.centering,
            training=config.training,
            steps=steps,
            seeds=NAME,
        )
        trained[name] = {key: summary[key] for key in ("pairs", "too_long")}
    scored = _scored(run, queries, records, held_out, list(sets))
    write_records(run.path(NAME, "scores.jsonl"), scored)
    bootstrap = Bootstrap(run.config.evaluation.bootstrap_samples, run.seed(f"{NAME}/bootstrap"))
    figures = ablation_figures(scored, lambda record: 1.0, bootstrap)
    result = {"steps": steps, "models": trained, "held_out": figures}
    write_bytes(run.path(NAME, "ablation.json"), (json.dumps(result, indent=1) + "\n").encode())
    return {name: figure["mean"] for name, figure in figures[last]["accuracy"].items()}


def _sets(queries: dict[str, str], records: Sequence[Record]) -> dict[str, list[Pair]]:
    """The pairs that each filter leaves, without sets that are the one before them."""
    found: dict[str, list[Pair]] = {}
    for name, dropping in AFTER_FILTERS.items():
        pairs = [comparison_pair(queries, record) for record in records if record["dropped_by"] not in dropping]
        if not found or len(pairs) < len(list(found.values())[-1]):
            found[name] = pairs
    return found


def _scored(
    run: Run, queries: dict[str, str], records: Sequence[Record], held_out: frozenset[str], names: Sequence[str]
) -> list[Record]:
    """The held-out pairs whose texts both fit, with every model's margin."""
    training = run.config.reward.training
    tokenizer = run.model_to_train(run.config.reward.model).tokenizer
    chosen = [record for record in records if record["query_id"] in held_out]
    pairs = [comparison_pair(queries, record) for record in chosen]
    rows = {text: text_tokens(tokenizer, text) for pair in pairs for text in (pair.chosen, pair.rejected)}
    fitting = [
        place
        for place, pair in enumerate(pairs)
        if max(len(rows[pair.chosen]), len(rows[pair.rejected])) <= training.max_length
    ]
    texts = list(dict.fromkeys(text for i in fitting for text in (pairs[i].chosen, pairs[i].rejected)))
    scores: dict[str, Mapping[str, float]] = {}
    with jax.set_mesh(run.sampling_mesh):
        for name in names:
            run.say(f"{NAME}: scoring {len(texts)} held-out texts with the model of {name}")
            scorer = RewardScorer(load_reward_model(run, f"{NAME}/{name}", alone=True), 2 * training.batch_size)
            found = scorer.score_tokens([rows[text] for text in texts])
            scores[name] = dict(zip(texts, found.tolist(), strict=True))
    return [
        {
            "query_id": chosen[i]["query_id"],
            "chosen": chosen[i]["chosen"]["text"],
            "rejected": chosen[i]["rejected"]["text"],
            "sets": [name for name in names if chosen[i]["dropped_by"] not in AFTER_FILTERS[name]],
            "margins": {name: scores[name][pairs[i].chosen] - scores[name][pairs[i].rejected] for name in names},
        }
        for i in fitting
    ]
