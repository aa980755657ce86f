"""What post-validation is worth to the reward model: one learned from all pairs, and one from those after each filter.

All start from the same model with the same head and learn by the same number of steps; the pairs of the same queries
are held out from all. Source: ALMoST (arXiv 2305.13735), section 4, which compares raw pairs, those after the heuristic
filter, and those after the as-is reward model's as well.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from almost_jax.errors import InputError
from almost_jax.evaluation import gold
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
    parted,
    place_of_group,
    train_reward_model,
)
from almost_jax.stages.training import count_steps, row_limit

NAME = "reward_ablation"


class Labelled(NamedTuple):
    """A record of comparisons.jsonl, and the same as the reward model's pair."""

    record: Record
    pair: Pair


def run_stage(run: Run) -> dict[str, Any]:
    """Train on each set of pairs and compare: comparisons.jsonl -> reward_ablation/{ablation.json,scores.jsonl,SET/}.

    Does nothing when the experiment has no `reward_ablation:` section. A set from which a filter drops nothing is the
    one before it and is left out.

    scores.jsonl has every held-out pair: {"query_id", "chosen", "rejected" (texts), "sets" (those it is in), "margins"
    {set whose model: score of chosen minus rejected}}. ablation.json has the steps, the pairs that each model learned
    from, and the figures of `ablation_figures` by the pairs ("held_out") and by the gold score ("by_gold", or None).

    Returns:
        {set: its model's accuracy on the held-out pairs that every filter kept}.

    Raises:
        InputError: no pair was kept, none fits, or none is left to train on.
        TrainingDiverged: a figure is not finite.
        Preempted: SIGTERM came; the state is saved.
    """
    settings = run.config.reward_ablation
    if settings is None:
        run.say(f"{NAME}: the experiment has no `{NAME}:` section, so this analysis is left out")
        return {NAME: "off"}
    config = run.config.reward
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    records = iter_records(run.path("comparisons.jsonl"))
    every = [Labelled(record, comparison_pair(queries, record)) for record in records]
    check_any_kept(run, NAME, sum(one.record["kept"] for one in every))
    source = run.model_to_train(config.model)
    tokenizer = source.tokenizer
    rows = {text: text_tokens(tokenizer, text) for one in every for text in (one.pair.chosen, one.pair.rejected)}
    most = row_limit(config.training, source.config)
    fitting = [one for one in every if max(len(rows[one.pair.chosen]), len(rows[one.pair.rejected])) <= most]
    sets = sets_of(fitting)
    last = list(sets)[-1]
    held_out = groups_held_out(fitting, sets[last], settings.held_out, run.seed(f"{NAME}/split"))
    run.say(f"{NAME}: {len(every) - len(fitting)} pairs are too long, the pairs of {len(held_out)} queries held out")
    train, test = parted(sets[last], held_out)
    steps = count_steps(config.training, len(train))
    steps = min(steps, settings.max_steps or steps)
    trained: dict[str, dict[str, Any]] = {}
    for name, pairs in sets.items():
        # All are watched on the pairs that every filter kept.
        summary = train_reward_model(
            run,
            f"{NAME}/{name}",
            config.model,
            [*parted(pairs, held_out)[0], *test],
            held_out=held_out,
            reference_samples=config.reference_samples,
            margin=config.margin,
            centering=config.centering,
            training=config.training,
            packed_length=config.packed_length,
            steps=steps,
            seeds=NAME,
            section="reward",
        )
        trained[name] = {"pairs": summary["pairs"]}
    scored = _scored(run, [one for one in fitting if one.pair.group in held_out], rows, list(sets))
    write_records(run.path(NAME, "scores.jsonl"), scored)
    bootstrap = Bootstrap(run.config.evaluation.bootstrap_samples, run.seed(f"{NAME}/bootstrap"))
    figures = ablation_figures(scored, lambda record: 1.0, bootstrap)
    by_gold = gold.analyse_ablation(queries, scored, bootstrap) if run.config.evaluation.gold else None
    result = {"steps": steps, "models": trained, "held_out": figures, "by_gold": by_gold}
    write_bytes(run.path(NAME, "ablation.json"), (json.dumps(result, indent=1) + "\n").encode())
    return {name: figure["mean"] for name, figure in figures[last]["accuracy"].items()}


def sets_of(every: Sequence[Labelled]) -> dict[str, list[Pair]]:
    """The pairs that each filter leaves, without sets that are the one before them."""
    found: dict[str, list[Pair]] = {}
    for name, dropping in AFTER_FILTERS.items():
        pairs = [one.pair for one in every if one.record["dropped_by"] not in dropping]
        if not found or len(pairs) < len(list(found.values())[-1]):
            found[name] = pairs
    return found


def groups_held_out(every: Sequence[Labelled], kept: Sequence[Pair], held_out: int, seed: int) -> frozenset[str]:
    """The queries whose pairs are held out: drawn from all, until so many of the kept pairs are among them.

    Args:
        every: all pairs.
        kept: those that every filter kept.
        held_out: how many.
        seed: orders the queries.

    Raises:
        InputError: no kept pair is left to train on.
    """
    sizes = Counter(pair.group for pair in kept)
    found: set[str] = set()
    taken = 0
    for group in sorted({one.pair.group for one in every}, key=lambda name: place_of_group(name, seed)):
        if taken >= held_out:
            break
        found.add(group)
        taken += sizes[group]
    if taken >= len(kept):
        raise InputError(
            f"{NAME}.held_out: {held_out} leaves none of {len(kept)} kept pairs that fit to train on; hold out fewer"
        )
    return frozenset(found)


def _scored(
    run: Run, held_out: Sequence[Labelled], rows: Mapping[str, Sequence[int]], names: Sequence[str]
) -> list[Record]:
    """The held-out pairs with every model's margin."""
    texts = list(dict.fromkeys(text for one in held_out for text in (one.pair.chosen, one.pair.rejected)))
    scores: dict[str, Mapping[str, float]] = {}
    with jax.set_mesh(run.sampling_mesh):
        for name in names:
            run.say(f"{NAME}: scoring {len(texts)} held-out texts with the model of {name}")
            model = load_reward_model(run, f"{NAME}/{name}", alone=True)
            scorer = RewardScorer(model, 2 * run.config.reward.training.batch_size, run.say)
            found = scorer.score_tokens([rows[text] for text in texts])
            scores[name] = dict(zip(texts, found.tolist(), strict=True))
    return [
        {
            "query_id": one.pair.group,
            "chosen": one.record["chosen"]["text"],
            "rejected": one.record["rejected"]["text"],
            "sets": [name for name in names if one.record["dropped_by"] not in AFTER_FILTERS[name]],
            "margins": {name: scores[name][one.pair.chosen] - scores[name][one.pair.rejected] for name in names},
        }
        for one in held_out
    ]
