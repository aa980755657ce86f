"""What post-validation is worth to the reward model: the same one on raw pairs, filtered ones, and the kept ones.

Each is trained from the same start by the same number of steps, on pairs of the same queries, and scored on the pairs
of the others as they are before and after each filter. Source: ALMoST (arXiv 2305.13735), section 4, which gives the
accuracy with raw pairs, with the heuristic filter, and with the as-is reward model's as well.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from almost_jax.core.partitioning import platform
from almost_jax.io.records import Record, iter_records, read_records, write_bytes
from almost_jax.io.run import Run
from almost_jax.sampling.layout import decode_layout
from almost_jax.sampling.scoring import score_sequences
from almost_jax.stages.pair_figures import accuracy_interval, pair_figures
from almost_jax.stages.reward import Pair, check_any_kept, comparison_pair, fit_pairs, split_pairs, tokenized
from almost_jax.stages.training import count_steps, fixed_length

NAME = "reward_ablation"
# What has dropped a pair that is not in a set, by the set's name. Pairs with an empty response or twice the same one
# say nothing about preference and are in none.
_SETS: Mapping[str, tuple[str, ...]] = {
    "raw": ("empty", "identical"),
    "heuristic": ("empty", "identical", "keyword", "length"),
    "as_is": ("empty", "identical", "keyword", "length", "as_is_reward"),
}


def run_stage(run: Run) -> dict[str, Any]:
    """Train on each set of pairs: queries.jsonl, comparisons.jsonl -> reward_ablation/ablation.json.

    Does nothing when the experiment has no `reward_ablation:` section. A set from which a filter drops nothing is the
    one before it and is left out.

    Returns:
        {set: accuracy on the held-out pairs that every filter kept}.

    Raises:
        InputError: no pair was kept, or none is left to train on.
        TrainingDiverged: a figure is not finite.
        Preempted: SIGTERM came; the state is saved.
    """
    settings = run.config.reward_ablation
    if settings is None:
        run.say(f"{NAME}: the experiment has no `{NAME}:` section, so this analysis is left out")
        return {NAME: "off"}
    config = run.config.reward
    training = config.training
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    found = _sets(queries, list(iter_records(run.path("comparisons.jsonl"))))
    last = list(found)[-1]
    check_any_kept(run, NAME, len(found[last]))
    _, rows, longest = tokenized(run.model_to_train(config.model).tokenizer, found["raw"], training.max_length)
    fitting = {
        name: [pair for pair in pairs if max(len(rows[pair.chosen]), len(rows[pair.rejected])) <= training.max_length]
        for name, pairs in found.items()
    }
    train, test = split_pairs(fitting[last], settings.held_out, run.seed(f"{NAME}/split"))
    held_out = {pair.group for pair in test}
    tests = {name: [pair for pair in pairs if pair.group in held_out] for name, pairs in fitting.items()}
    texts = list(dict.fromkeys(text for pair in tests["raw"] for text in (pair.chosen, pair.rejected)))
    steps, length = count_steps(training, len(train)), fixed_length(longest)
    result: dict[str, Any] = {"steps": steps, "models": {}}
    for name, pairs in fitting.items():
        own = [pair for pair in pairs if pair.group not in held_out]
        run.say(f"{NAME}: {name}, {len(own)} pairs to train on, {len(test)} held out of those that all filters kept")
        # Given anew, since training takes its arrays.
        source = run.model_to_train(config.model)
        params = fit_pairs(
            run, f"{NAME}/{name}", source, own, rows, length, steps, seeds=NAME, margin=config.margin,
            centering=config.centering, training=training, evaluate=None,
        )  # fmt: skip
        with jax.set_mesh(run.mesh):
            flat, shape = decode_layout(params, source.config, platform())
            found_scores = score_sequences(
                flat, shape, [rows[text] for text in texts], batch_size=2 * training.batch_size, multiple=length
            )
        scores = dict(zip(texts, found_scores.tolist(), strict=True))
        result["models"][name] = {
            "pairs": len(own),
            "held_out": {on: _figures(part, scores) for on, part in tests.items()},
        }
    write_bytes(run.path(NAME, "ablation.json"), (json.dumps(result, indent=1) + "\n").encode())
    return {name: model["held_out"][last]["accuracy"] for name, model in result["models"].items()}


def _sets(queries: dict[str, str], records: Sequence[Record]) -> dict[str, list[Pair]]:
    """The pairs that each filter leaves, without sets that are the one before them."""
    found: dict[str, list[Pair]] = {}
    for name, dropping in _SETS.items():
        pairs = [comparison_pair(queries, record) for record in records if record["dropped_by"] not in dropping]
        if not found or len(pairs) < len(list(found.values())[-1]):
            found[name] = pairs
    return found


def _figures(pairs: Sequence[Pair], scores: Mapping[str, float]) -> dict[str, Any]:
    """`pair_figures` of a model's scores on some pairs that matter here, and the interval of its accuracy."""
    margins = np.array([scores[pair.chosen] - scores[pair.rejected] for pair in pairs])
    gaps = np.array([pair.chosen_length - pair.rejected_length for pair in pairs])
    groups = [pair.group for pair in pairs]
    figures = pair_figures(margins, gaps, groups)
    names = ("accuracy", "longer_wins_accuracy", "length_matched_accuracy", "length_matched_ci95", "length_correlation")
    return {
        "pairs": len(pairs),
        "ci95": accuracy_interval(margins, groups),
        **{name: figures[name] for name in names},
    }
