"""Whether each step of the method did what the paper claims, judged by the micro-world's gold score.

Every system answers the same held-out queries: each configuration, N samples of the demonstrations' assistant, the four
policies, and the RLSF policies kept along the way. All scored responses are in evaluation/items.jsonl, the figures in
evaluation/gold.json. This is the only module of the pipeline that reads the gold score.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from almost_jax.config import PromptedModel, SamplingConfig
from almost_jax.errors import InputError
from almost_jax.evaluation import analyses
from almost_jax.evaluation.analyses import Item
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.models import Model, load_model
from almost_jax.io.records import Record, RecordWriter, read_records, write_bytes, write_records
from almost_jax.io.run import Run
from almost_jax.microworld.gold import gold_score, kind
from almost_jax.microworld.world import generate_queries
from almost_jax.sampling.engine import Request, generate
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.prompting import (
    PROMPT_MULTIPLE,
    DialogueRequest,
    Reply,
    reply,
    respond,
    sampling_rules,
    stop_tokens,
)
from almost_jax.stages.reward import RewardScorer
from almost_jax.stages.templates import Turn, demonstrations_text

# Responses are sampled, scored and written in groups of this many sampling batches; a resumed evaluation repeats a
# torn group from its beginning, so that every score is computed in the batch it would have been computed in.
_BATCHES_PER_GROUP = 4
OTHER = "other"  # the gold score's name for a query that isn't one of its world's


@dataclass(frozen=True)
class System:
    """Something that answers held-out queries.

    `prompt` is the few-shot prompt, "" for a fine-tuned model. With `reference`, the log-ratio to that policy is taken
    of every response; with `as_is`, the as-is reward model scores them too.
    """

    name: str
    load: Callable[[], Model]
    prompt: str
    sampling: SamplingConfig
    samples: int
    queries: Sequence[Record]
    seed: int
    reference: Callable[[], Model] | None = None
    as_is: bool = False


@dataclass(frozen=True)
class Scorers:
    """The reward models that score responses; `as_is` is None where none was trained."""

    reward: RewardScorer
    as_is: RewardScorer | None


def run_stage(run: Run) -> dict[str, Any]:
    """Sample, score and analyse; writes evaluation/items.jsonl and evaluation/gold.json.

    Does nothing without `evaluation.gold`: outside the micro-world there is no gold score.

    Returns:
        The mean gold score of each policy.

    Raises:
        InputError: a record or model of an earlier stage is missing.
    """
    if not run.config.evaluation.gold:
        run.say("evaluation: evaluation.gold is off, so there is no gold score to compare with; nothing written")
        return {"gold": "off"}
    queries = held_out_queries(run)
    with jax.set_mesh(run.mesh):
        items = score_systems(run, systems(run, queries))
    figures = analyse(run, queries, items)
    write_bytes(run.path("evaluation/gold.json"), (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())
    for place, count in figures["contamination"].items():
        if count:
            run.say(f"evaluation: {count} held-out queries also stand in {place}: its figures may flatter the method")
    return {name: figure["mean"] for name, figure in figures["policies"].items()}


def held_out_queries(run: Run) -> list[Record]:
    """The held-out queries {id, text} of evaluation_queries.jsonl, which is written first if it isn't there.

    Raises:
        InputError: the world has fewer questions of that side.
    """
    path = run.path("evaluation_queries.jsonl")
    if not path.exists():
        settings = run.config.evaluation
        try:
            texts = generate_queries(run.seed("evaluation/queries"), settings.queries, settings.split)
        except ValueError as error:
            raise InputError(f"evaluation.queries: {error}") from error
        write_records(path, [{"id": f"held-out-{index:05d}", "text": text} for index, text in enumerate(texts)])
    return read_records(path)


def systems(run: Run, queries: Sequence[Record]) -> list[System]:
    """Every system to judge, in the order in which they are sampled."""
    config = run.config
    settings, comparisons, demonstrations = config.evaluation, config.comparisons, config.demonstrations

    def prompted(name: str, model: PromptedModel, sampling: SamplingConfig, samples: int, as_is: bool) -> System:
        text, seed = demonstrations_text(model), run.seed(f"evaluation/{name}")
        return System(name, partial(run.model, model.model), text, sampling, samples, queries, seed, as_is=as_is)

    def trained(name: str, folder: str) -> System:
        seed = run.seed(f"evaluation/{name}")
        return System(name, partial(_trained, run, folder), "", settings.sampling, 1, queries, seed)

    found = [
        prompted(f"configuration/{name}", model, comparisons.sampling, 1, True)
        for name, model in comparisons.configurations.items()
    ]
    found.append(prompted("best_of_n", demonstrations.assistant, demonstrations.sampling, settings.best_of, False))
    base = settings.prompted or demonstrations.assistant.model_copy(update={"model": config.sft.model})
    found.append(prompted("policy/prompted", base, settings.sampling, 1, False))
    found += [
        trained(f"policy/{name}", f"{name}/model")
        for name in analyses.POLICIES[1:]
        if name != "sft_self_play" or demonstrations.baseline
    ]
    # The policies of the curve share a seed, so that what differs between them is less the draw.
    seed, some = run.seed("evaluation/curve"), queries[: settings.curve_queries]
    for step in _snapshots(run):
        load, reference = partial(_trained, run, f"rlsf/policies/{step}"), partial(_trained, run, "sft/model")
        found.append(System(f"curve/{step}", load, "", settings.sampling, 1, some, seed, reference=reference))
    return found


def score_systems(run: Run, judged: Sequence[System]) -> list[Item]:
    """Sample and score every response of every system, continuing where an earlier evaluation was interrupted.

    Returns:
        The items of evaluation/items.jsonl.
    """
    path = run.path("evaluation/items.jsonl")
    wanted = [_key(system.name, request_id) for system in judged for request_id, _ in _requests(system)]
    if path.exists():
        items = read_records(path)
        if [_item_key(item) for item in items] == wanted:
            return items
    sampling_batch = run.config.evaluation.sampling.batch_size
    as_is_folder = run.path("as_is_reward/model")
    scorers = Scorers(
        RewardScorer(_trained(run, "reward/model"), sampling_batch),
        RewardScorer(_trained(run, "as_is_reward/model"), sampling_batch) if as_is_folder.is_dir() else None,
    )
    with RecordWriter(path, _item_key) as writer:
        with run.progress("evaluation: sampling held-out responses", len(wanted), len(writer.done)) as progress:
            for system in judged:
                for item in _missing_items(system, scorers, writer.done):
                    writer.write(item)
                    progress.advance()
        writer.finish()
        return writer.records


def analyse(run: Run, queries: Sequence[Record], items: Sequence[Item]) -> dict[str, Any]:
    """All the figures of gold.json, from records alone."""
    config = run.config
    bootstrap = Bootstrap(config.evaluation.bootstrap_samples, run.seed("evaluation/bootstrap"))
    ids = [query["id"] for query in queries]
    names = list(config.comparisons.configurations)
    of_configurations = [item for item in items if item["system"].startswith("configuration/")]
    # compare() goes from worst to best, configurations are listed best first.
    worst_first = {name: f"configuration/{name}" for name in reversed(names)}
    configurations, gaps = analyses.compare(items, worst_first, ids, bootstrap)
    policies, steps = analyses.compare(items, {name: f"policy/{name}" for name in analyses.POLICIES}, ids, bootstrap)
    texts = {query["id"]: query["text"] for query in read_records(run.path("queries.jsonl"))}
    comparisons = read_records(run.path("comparisons.jsonl"))
    strangers = [record["query_id"] for record in comparisons if record["query_id"] not in texts]
    if strangers:
        raise InputError(f"{run.path('comparisons.jsonl')}: query_id {strangers[0]!r} is not in queries.jsonl")
    sources = {"self_play": "demonstrations_self_play.jsonl", "reward_guided": "demonstrations.jsonl"}
    played = {name: read_records(run.path(file)) for name, file in sources.items() if run.path(file).exists()}
    curve = [item for item in items if item["system"].startswith("curve/")]
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
        "rlsf_curve": analyses.over_optimisation(curve, ids[: config.evaluation.curve_queries], bootstrap),
        "by_kind": analyses.by_kind([*of_configurations, *policy_items]),
        "by_length": analyses.by_length(of_configurations),
        "lengths": analyses.response_lengths(items),
        "contamination": _contamination(queries, texts.values(), played),
        "definitions": analyses.DEFINITIONS,
        "bootstrap": {"samples": bootstrap.samples, "seed": bootstrap.seed},
    }


def _missing_items(system: System, scorers: Scorers, done: set[str]) -> Iterator[Item]:
    """Sample and score the responses of a system that aren't in `done`, group by group."""
    requests = _requests(system)
    size = _BATCHES_PER_GROUP * system.sampling.batch_size
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    groups = [group for group in groups if any(_key(system.name, request_id) not in done for request_id, _ in group)]
    if not groups:
        return
    model = system.load()
    reference = system.reference() if system.reference else None
    for group in groups:
        for item in _score_group(system, model, reference, scorers, group):
            if _item_key(item) not in done:
                yield item


def _score_group(
    system: System, model: Model, reference: Model | None, scorers: Scorers, group: Sequence[tuple[str, Record]]
) -> list[Item]:
    queries = [query for _, query in group]
    if reference is None:
        requests = [DialogueRequest(request_id, _asked(query)) for request_id, query in group]
        replies = list(
            respond(model, system.prompt, requests, next_role="assistant", sampling=system.sampling, seed=system.seed)
        )
        log_ratios: list[float | None] = [None] * len(group)
    else:
        replies, log_ratios = _with_log_ratio(system, model, reference, group)
    dialogues: list[list[Turn]] = [
        [*_asked(query), {"role": "assistant", "text": answer.text}]
        for query, answer in zip(queries, replies, strict=True)
    ]
    rewards = scorers.reward.score(dialogues)
    as_is = scorers.as_is.score(dialogues) if system.as_is and scorers.as_is else None
    return [
        {
            "query_id": query["id"],
            "query": query["text"],
            "kind": kind(query["text"]),
            "system": system.name,
            "sample": int(request_id.rsplit("/", 1)[1]),
            "text": answer.text,
            "finish": answer.finish,
            "gold": gold_score(query["text"], answer.text),
            "reward": float(rewards[index]),
            "as_is": None if as_is is None else float(as_is[index]),
            "kl": log_ratios[index],
        }
        for index, ((request_id, query), answer) in enumerate(zip(group, replies, strict=True))
    ]


def _with_log_ratio(
    system: System, model: Model, reference: Model, group: Sequence[tuple[str, Record]]
) -> tuple[list[Reply], list[float | None]]:
    """Replies, and the log-ratio to the reference summed over the very tokens that were sampled.

    Both sides are scored by the same program at the sampling temperature, so a policy that is the reference gets
    exactly 0; greedy sampling is scored at temperature 1.
    """
    tokenizer, sampling = model.tokenizer, system.sampling
    prompts = [prompt_tokens(tokenizer, _asked(query)) for _, query in group]
    rules = sampling_rules(sampling, stop_tokens(tokenizer, ()))
    completions = list(
        generate(
            model.params,
            model.config,
            [Request(request_id, tuple(prompt)) for (request_id, _), prompt in zip(group, prompts, strict=True)],
            rules,
            seed=system.seed,
            prefix_tokens=(),
            batch_size=sampling.batch_size,
            prompt_multiple=PROMPT_MULTIPLE,
        )
    )
    sums = [
        [
            float(np.sum(logprobs, dtype=np.float64))
            for logprobs in completion_logprobs(
                scored.params,
                scored.config,
                prompts,
                [completion.tokens for completion in completions],
                temperature=sampling.temperature or 1.0,
                batch_size=sampling.batch_size,
                multiple=PROMPT_MULTIPLE,
            )
        ]
        for scored in (model, reference)
    ]
    replies = [reply(tokenizer, completion, ()) for completion in completions]
    return replies, [policy - other for policy, other in zip(*sums, strict=True)]


def _requests(system: System) -> list[tuple[str, Record]]:
    """(request id, query) of every response of a system, in order."""
    return [(f"{query['id']}/{sample}", query) for query in system.queries for sample in range(system.samples)]


def _asked(query: Record) -> list[Turn]:
    return [{"role": "human", "text": query["text"]}]


def _key(system: str, request_id: str) -> str:
    return f"{system}/{request_id}"


def _item_key(item: Record) -> str:
    return _key(item["system"], f"{item['query_id']}/{item['sample']}")


def _trained(run: Run, folder: str) -> Model:
    path = run.path(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such model; the stage {folder.split('/')[0]} must finish before the evaluation")
    return load_model(str(path), run.mesh, run.config.compute_dtype)


def _snapshots(run: Run) -> list[int]:
    """Steps of the RLSF policies that were kept."""
    folder: Path = run.path("rlsf/policies")
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []


def _contamination(
    queries: Sequence[Record], training: Iterable[str], played: dict[str, list[Record]]
) -> dict[str, int]:
    """How many held-out queries stand word for word in what the method trained on."""
    held_out = {" ".join(query["text"].split()) for query in queries}
    places = {"queries": [" ".join(text.split()) for text in training]}
    for name, records in played.items():
        turns = [turn["text"] for record in records for turn in record["turns"] if turn["role"] == "human"]
        places[f"demonstrations, {name}"] = [" ".join(text.split()) for text in turns]
    return {place: len(held_out & set(texts)) for place, texts in places.items()}
