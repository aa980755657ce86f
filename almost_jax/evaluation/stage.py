"""The evaluation stage: every system answers held-out queries, and what can be said of each step is written down.

evaluation/items.jsonl and evaluation/played.jsonl hold the scored responses and the scored turns of the demonstrations,
evaluation/scores.json the figures that the reward models and lengths give, and evaluation/gold.json, in the
micro-world, those of the gold score.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from almost_jax.evaluation import gold, scores
from almost_jax.evaluation.analyses import Item
from almost_jax.evaluation.held_out import held_out_queries, load_scorers, score_systems, systems
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.records import Record, RecordWriter, read_records, write_bytes
from almost_jax.io.run import Run
from almost_jax.stages.demonstrations import is_answered
from almost_jax.stages.templates import Turn

_SOURCES = {"self_play": "demonstrations_self_play.jsonl", "reward_guided": "demonstrations.jsonl"}
_DIALOGUES_AT_ONCE = 32  # demonstrations that are scored together


def run_stage(run: Run) -> dict[str, Any]:
    """Sample, score and analyse.

    Does nothing without held-out queries, that is without `evaluation.gold` and `evaluation.questions`.

    Returns:
        The mean score of each policy: the gold score where there is one, else the reward model's.

    Raises:
        InputError: a record or model of an earlier stage is missing.
    """
    queries = held_out_queries(run)
    if not queries:
        run.say("evaluation: evaluation.gold is off and there are no evaluation.questions; nothing written")
        return {"queries": 0}
    judged = run.config.evaluation.gold
    truth = gold.TRUTH if judged else None
    sources = {name: read_records(run.path(file)) for name, file in _SOURCES.items() if run.exists(file)}
    with jax.set_mesh(run.sampling_mesh):
        items = score_systems(run, systems(run, queries), truth)
        played = score_demonstrations(run, sources)
    settings = run.config.evaluation
    ids = [query["id"] for query in queries]
    bootstrap = Bootstrap(settings.bootstrap_samples, run.seed("evaluation/bootstrap"))
    names = list(run.config.comparisons.configurations)
    found = _contamination(queries, [query["text"] for query in read_records(run.path("queries.jsonl"))], sources)
    by_score = scores.analyse(items, played, names, settings.best_of, ids, bootstrap) | {"contamination": found}
    _write(run, "scores", by_score)
    if judged:
        figures = gold.analyse(run, queries, items) | {"contamination": found}
        _write(run, "gold", figures)
    for place, count in found.items():
        if count:
            run.say(f"evaluation: {count} held-out queries also stand in {place}: its figures may flatter the method")
    if judged:
        return {name: figure["mean"] for name, figure in figures["policies"].items()}
    return {name: figure["reward"]["mean"] for name, figure in by_score["policies"].items()}


def score_demonstrations(run: Run, sources: Mapping[str, Sequence[Record]]) -> list[Item]:
    """Score every assistant turn of the demonstrations by the reward models; writes evaluation/played.jsonl.

    Plain self-play is scored too, which nothing scored when it was played. A turn is scored behind its own dialogue.

    Returns:
        Items {query_id, system (the source), sample (the turn's place among the assistant's), text, reward, as_is}.
    """
    path = run.path("evaluation/played.jsonl")
    turns = [
        (name, record["query_id"], number, dialogue)
        for name, records in sources.items()
        for record in records
        if is_answered(record)
        for number, dialogue in enumerate(_up_to_each_answer(record))
    ]
    expected = [f"{name}/{query}/{number}" for name, query, number, _ in turns]
    if run.exists("evaluation/played.jsonl"):
        items = read_records(path)
        if [_played_key(item) for item in items] == expected:
            return items
    scorers = load_scorers(run, None)
    with RecordWriter(path, _played_key) as writer:
        with run.progress("evaluation: scoring demonstrations", len(turns), len(writer.done)) as progress:
            for places in writer.torn_groups(expected, _DIALOGUES_AT_ONCE):
                part = turns[places.start : places.stop]
                dialogues = [dialogue for _, _, _, dialogue in part]
                rewards = scorers.reward.score(dialogues)
                as_is = None if scorers.as_is is None else scorers.as_is.score(dialogues)
                for index, (name, query, number, dialogue) in enumerate(part):
                    item = {
                        "query_id": query,
                        "system": name,
                        "sample": number,
                        "text": dialogue[-1]["text"],
                        "reward": float(rewards[index]),
                        "as_is": None if as_is is None else float(as_is[index]),
                        "gold": None,
                    }
                    if writer.write_missing(item):
                        progress.advance()
        writer.finish()
    return read_records(path)


def _up_to_each_answer(record: Record) -> list[list[Turn]]:
    turns: list[Turn] = [{"role": turn["role"], "text": turn["text"]} for turn in record["turns"]]
    return [turns[: place + 1] for place, turn in enumerate(turns) if turn["role"] == "assistant"]


def _played_key(item: Record) -> str:
    return f"{item['system']}/{item['query_id']}/{item['sample']}"


def _write(run: Run, name: str, figures: Mapping[str, Any]) -> None:
    content = json.dumps(figures, indent=1, allow_nan=False) + "\n"
    write_bytes(run.path(f"evaluation/{name}.json"), content.encode())


def _contamination(
    queries: Sequence[Record], training: Iterable[str], played: Mapping[str, Sequence[Record]]
) -> dict[str, int]:
    """How many held-out queries stand word for word in what the method trained on."""
    held_out = {" ".join(query["text"].split()) for query in queries}
    places = {"queries": [" ".join(text.split()) for text in training]}
    for name, records in played.items():
        turns = [turn["text"] for record in records for turn in record["turns"] if turn["role"] == "human"]
        places[f"demonstrations, {name}"] = [" ".join(text.split()) for text in turns]
    return {place: len(held_out & set(texts)) for place, texts in places.items()}
