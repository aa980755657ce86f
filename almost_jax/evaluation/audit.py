"""The assumption audit: how often the rule of thumb agrees with a second opinion, before anything large is built on it.

A small sample of queries is answered by every configuration, and each rung (two configurations that are neighbours in
the rule's order) is put to the as-is reward model and, if one is configured, to a judge. A rung on which they can't be
told from a coin adds noise to the comparisons; one that they turn around adds wrong pairs. ALMoST (arXiv 2305.13735)
trusts the rule; its section 4 shows, afterwards, where it holds.
"""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax

from almost_jax.errors import InputError
from almost_jax.evaluation.analyses import Item, collect, of_system
from almost_jax.evaluation.duel import missing
from almost_jax.evaluation.judge import REPLIES, Endpoint, Judge
from almost_jax.evaluation.scores import rungs
from almost_jax.evaluation.statistics import Bootstrap, clusters, interval
from almost_jax.evaluation.vicuna import judge_pairs, summarize
from almost_jax.io.distributed import from_primary
from almost_jax.io.records import Record, RecordWriter, read_records, write_bytes
from almost_jax.io.run import Run
from almost_jax.stages.comparisons import by_model, respond_as, response_key, rule_of_thumb
from almost_jax.stages.reward import RewardScorer, load_reward_model
from almost_jax.stages.templates import Turn

Verdict: TypeAlias = Literal["holds", "noise", "reversed"]
SCORERS = {"as_is": "the as-is reward model", "judge": "the judge"}


def run_stage(run: Run) -> dict[str, Any]:
    """Audit the rule of thumb: queries.jsonl, as_is_reward/model -> audit/responses.jsonl, audit/audit.json.

    The responses are the ones that the stage `responses` will draw for these queries. Does nothing with
    `audit.queries: 0`.

    Returns:
        Every rung's verdict by every scorer.

    Raises:
        InputError: the configurations contradict the rule of thumb, or the judge's server refuses or leaves pairs
            without a reply: the next run asks for these alone.
    """
    config = run.config.audit
    if not config.queries:
        run.say("audit: audit.queries is 0, so the rule of thumb is taken on trust")
        return {"queries": 0}
    everything = read_records(run.path("queries.jsonl"))
    chosen = random.Random(run.seed("audit")).sample(range(len(everything)), min(config.queries, len(everything)))
    queries = [everything[place] for place in sorted(chosen)]
    with jax.set_mesh(run.sampling_mesh):
        responses = _responses(run, queries)
        scores = _as_is_scores(run, queries, responses)
    figures = analyse(run, queries, _items(responses, scores))
    if config.judge is not None:
        # One process asks: a judge costs money, and need not answer twice alike.
        figures = from_primary(lambda: _ask_the_judge(run, queries, responses, figures))
    content = json.dumps(figures, indent=1, allow_nan=False) + "\n"
    write_bytes(run.path("audit", "audit.json"), content.encode())
    for line in warnings(figures):
        run.say(line)
    verdicts = {
        name: {scorer: rung[scorer]["verdict"] for scorer in SCORERS if scorer in rung}
        for name, rung in figures["rungs"].items()
    }
    return {"queries": len(queries), **verdicts}


def analyse(run: Run, queries: Sequence[Record], items: Sequence[Item]) -> dict[str, Any]:
    """The figures of audit.json as far as the as-is reward model gives them.

    Returns:
        {"queries", "rungs": {"A over B": {"rule", "longer", "as_is": {"mean", "ci95", "n", "length_matched",
        "verdict"}}}, "configurations": {"A": {"as_is": {"mean", "ci95", "n"}}}}, the last in standard deviations of
        that model's reference samples; without it the rungs have `rule` and `longer` alone.
    """
    names = list(run.config.comparisons.configurations)
    bootstrap = _bootstrap(run)
    measures = ["as_is"] if items and items[0]["as_is"] is not None else []
    found = rungs(items, names, measures, [query["id"] for query in queries], bootstrap)
    for better, worse in itertools.pairwise(names):
        rung = found[f"{better} over {worse}"]
        rung["rule"] = rule_of_thumb(better, worse, run.config.comparisons).rule
        for measure in measures:
            rung[measure]["verdict"] = verdict(rung[measure]["ci95"])
    means = {
        name: {
            measure: interval(clusters(collect(group, measure), [query["id"] for query in queries]), bootstrap)
            for measure in measures
        }
        for name in names
        if (group := of_system(items, f"configuration/{name}"))
    }
    return {"queries": len(queries), "rungs": found, "configurations": means}


def verdict(ci95: Sequence[float]) -> Verdict:
    """What an interval of the agreement says: above one half the rung holds, below it is reversed, else it is noise."""
    if ci95[0] > 0.5:
        return "holds"
    return "reversed" if ci95[1] < 0.5 else "noise"


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """A line for every rung that doesn't hold, and one if nothing could judge the rungs."""
    lines = []
    for name, rung in figures["rungs"].items():
        for scorer, label in SCORERS.items():
            found = rung.get(scorer)
            if found is None or found["verdict"] == "holds":
                continue
            low, high = found["ci95"]
            what = "can't be told from a coin" if found["verdict"] == "noise" else "the rule is the wrong way round"
            lines.append(
                f"audit: warning: {name} ({rung['rule']}): {label} agrees in {found['mean']:.0%} of n = {found['n']} "
                f"(95% {low:.0%} to {high:.0%}): {what}"
            )
    if not any(scorer in rung for rung in figures["rungs"].values() for scorer in SCORERS):
        lines.append(
            "audit: warning: with as_is_reward.votes none and no audit.judge nothing can say whether the rule of thumb "
            "holds; only lengths were compared"
        )
    return lines


def _responses(run: Run, queries: Sequence[Record]) -> list[Record]:
    """Every configuration's response to the queries, continuing where an earlier process stopped."""
    path = run.path("audit", "responses.jsonl")
    plan = by_model(run.config.comparisons.configurations)
    expected = [response_key({"configuration": name, "query_id": query["id"]}) for name in plan for query in queries]
    if run.exists("audit", "responses.jsonl"):
        found = read_records(path)
        if [response_key(record) for record in found] == expected:
            return found
    with RecordWriter(path, key=response_key) as writer:
        with run.progress("audit", len(expected), len(writer.done)) as progress:
            for name in plan:
                already = sum(f"{name}/{query['id']}" in writer.done for query in queries)
                for record in respond_as(run, "audit", name, queries, already):
                    writer.write(record)
                    progress.advance()
        writer.finish()
    return read_records(path)


def _as_is_scores(run: Run, queries: Sequence[Record], responses: Sequence[Record]) -> list[float] | None:
    """The as-is reward model's score of every response, None where there is no such model."""
    if not run.exists("as_is_reward", "model"):
        return None
    model = load_reward_model(run, "as_is_reward", alone=True)
    scorer = RewardScorer(model, run.config.as_is_reward.training.batch_size, run.say)
    texts = {query["id"]: query["text"] for query in queries}
    dialogues: list[list[Turn]] = [
        [{"role": "human", "text": texts[record["query_id"]]}, {"role": "assistant", "text": record["text"]}]
        for record in responses
    ]
    return [float(score) for score in scorer.score(dialogues)]


def _items(responses: Sequence[Record], scores: Sequence[float] | None) -> list[Item]:
    return [
        {
            "query_id": record["query_id"],
            "system": f"configuration/{record['configuration']}",
            "text": record["text"],
            "as_is": None if scores is None else scores[place],
        }
        for place, record in enumerate(responses)
    ]


def _ask_the_judge(
    run: Run, queries: Sequence[Record], responses: Sequence[Record], figures: dict[str, Any]
) -> dict[str, Any]:
    """Put every rung to the judge, in both orders; a disagreement of the two is a tie, and a tie counts half.

    Returns:
        `figures` with what it says of each rung, and the mean score that it gave each configuration's responses.

    Raises:
        InputError: the server refuses, or pairs are left without a reply: the next run asks for these alone.
    """
    config = run.config.audit.judge
    assert config is not None
    judge = Judge(Endpoint(**config.model_dump()), run.path(REPLIES))
    texts = {(record["configuration"], record["query_id"]): record["text"] for record in responses}
    judged: dict[str, list[Record]] = {}
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in run.config.comparisons.configurations}
    for better, worse in itertools.pairwise(scores):
        pairs = [
            {
                "question_id": query["id"],
                "question": query["text"],
                "first": texts[better, query["id"]],
                "second": texts[worse, query["id"]],
            }
            for query in queries
        ]
        items = judged[f"{better} over {worse}"] = judge_pairs(pairs, judge)
        for item in items:
            for both in filter(None, item["scores"]):
                for name, score in zip((better, worse), both, strict=True):
                    scores[name].setdefault(item["question_id"], []).append(score)
    bootstrap = _bootstrap(run)
    summaries = {rung: summarize(items, bootstrap) for rung, items in judged.items()}
    if lacking := sum(summary["not_judged"] for summary in summaries.values()):
        reason = missing([item for items in judged.values() for item in items])[-1]
        raise InputError(f"audit.judge: {lacking} pairs have no reply yet ({reason}); the same command asks for them")
    for rung, summary in summaries.items():
        rate = summary["win_rate"]
        if rate is None:
            run.say(f"audit: warning: {rung}: the judge gave no verdict that can be read")
            continue
        figures["rungs"][rung]["judge"] = {
            **rate,
            "length_matched": summary["length_controlled"],
            "verdict": verdict(rate["ci95"]),
            "unparsed": summary["unparsed"],
        }
    for name, given in scores.items():
        if given:
            found = interval(clusters(given, [query["id"] for query in queries]), bootstrap)
            figures["configurations"].setdefault(name, {})["judge"] = found
    return figures


def _bootstrap(run: Run) -> Bootstrap:
    return Bootstrap(run.config.audit.bootstrap_samples, run.seed("audit/bootstrap"))
