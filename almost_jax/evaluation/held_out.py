"""Every system answers the same held-out queries, and every response is scored by what can score it.

Systems are each configuration, N samples of the demonstrations' assistant, the four policies, and the RLSF policies
kept along the way. The reward models score all their responses, the micro-world's gold score too where there is one.
All scored responses are in evaluation/items.jsonl.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from almost_jax.config import PromptedModel, SamplingConfig
from almost_jax.errors import InputError
from almost_jax.evaluation import analyses
from almost_jax.evaluation.analyses import Item
from almost_jax.io.distributed import from_primary
from almost_jax.io.models import Model
from almost_jax.io.records import Record, RecordWriter, read_records, write_records
from almost_jax.io.run import Run
from almost_jax.microworld.world import generate_queries
from almost_jax.sampling.engine import Engine, Request, in_order
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.execution import head_chunk
from almost_jax.stages.instructions import load_instructions
from almost_jax.stages.prompting import (
    PROMPT_MULTIPLE,
    DialogueRequest,
    Reply,
    Responder,
    engine_settings,
    group_size,
    reply,
    sampling_rules,
    stop_tokens,
)
from almost_jax.stages.reward import RewardScorer
from almost_jax.stages.templates import Turn, demonstrations_text


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
class Truth:
    """What knows how good a response is: the score of (query, response), and the kind of a query."""

    score: Callable[[str, str], float]
    kind: Callable[[str], str]


@dataclass(frozen=True)
class Scorers:
    """What scores responses; `as_is` is None where no such model was trained, `truth` where nothing knows it."""

    reward: RewardScorer
    as_is: RewardScorer | None
    truth: Truth | None


# A group of (request id, query) -> the replies, and the log-ratio of each where it is taken.
Answer: TypeAlias = Callable[[Sequence[tuple[str, Record]]], tuple[list[Reply], list[float | None]]]


def run_stage(run: Run) -> dict[str, Any]:
    """Draw the held-out queries before anything could train on them: demonstrations keep clear of them."""
    return {"queries": len(held_out_queries(run))}


def held_out_queries(run: Run) -> list[Record]:
    """The held-out queries {id, text} of evaluation_queries.jsonl, which is written first if it isn't there.

    They come from the micro-world where its gold score judges, else from `evaluation.questions`; without either there
    are none, and no file.

    Raises:
        InputError: the world has fewer questions of that side, or the file of questions is malformed.
    """
    path = run.path("evaluation_queries.jsonl")
    settings = run.config.evaluation
    if not settings.gold and settings.questions is None:
        return []
    if not run.exists("evaluation_queries.jsonl"):
        if settings.questions is not None:
            texts = load_instructions(settings.questions)[: settings.queries]
        else:
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
    # Without a gold score the as-is reward model is the only one that training did not aim at.
    everything = not settings.gold

    def prompted(name: str, model: PromptedModel, sampling: SamplingConfig, samples: int, as_is: bool) -> System:
        text, seed = demonstrations_text(model), run.seed(f"evaluation/{name}")
        load = partial(run.model, model.model)
        return System(name, load, text, sampling, samples, queries, seed, as_is=as_is or everything)

    def trained(name: str, folder: str, samples: int) -> System:
        seed = run.seed(f"evaluation/{name}")
        load = partial(trained_model, run, folder)
        return System(name, load, "", settings.sampling, samples, queries, seed, as_is=everything)

    found = [
        prompted(f"configuration/{name}", model, comparisons.sampling, 1, True)
        for name, model in comparisons.configurations.items()
    ]
    found.append(prompted("best_of_n", demonstrations.assistant, demonstrations.sampling, settings.best_of, False))
    base = settings.prompted or demonstrations.assistant.model_copy(update={"model": config.sft.model})
    found.append(prompted("policy/prompted", base, settings.sampling, 1, False))
    found += [
        trained(f"policy/{name}", f"{name}/model", 1)
        for name in analyses.POLICIES[1:]
        if name != "sft_self_play" or demonstrations.baseline
    ]
    if config.dpo is not None:
        found.append(trained("policy/dpo", "dpo/model", 1))
    if settings.gold or config.as_is_reward.votes != "none":
        # Only another judge than the reward model can say what choosing by it is worth.
        found.append(trained("policy/sft_best_of_n", "sft/model", settings.best_of))
    # The policies of the curve share a seed, so that what differs between them is less the draw.
    seed, some = run.seed("evaluation/curve"), queries[: settings.curve_queries]
    reference = partial(trained_model, run, "sft/model")
    for curve, folder in analyses.CURVES.items():
        for step in _snapshots(run, folder):
            load = partial(trained_model, run, f"{folder}/policies/{step}")
            found.append(System(f"{curve}/{step}", load, "", settings.sampling, 1, some, seed, reference, True))
    return found


def load_scorers(run: Run, truth: Truth | None) -> Scorers:
    """The run's reward models, in batches of `evaluation.sampling.batch_size`.

    Raises:
        InputError: there is no reward model.
    """
    batch = run.config.evaluation.sampling.batch_size
    as_is = "as_is_reward/model"
    return Scorers(
        RewardScorer(trained_model(run, "reward/model"), batch, run.say),
        RewardScorer(trained_model(run, as_is), batch, run.say) if run.exists(as_is) else None,
        truth,
    )


def score_systems(run: Run, judged: Sequence[System], truth: Truth | None) -> list[Item]:
    """Sample and score every response of every system, continuing where an earlier evaluation was interrupted.

    Returns:
        The items of evaluation/items.jsonl.
    """
    path = run.path("evaluation/items.jsonl")
    wanted = [_key(system.name, request_id) for system in judged for request_id, _ in _requests(system)]
    if run.exists("evaluation/items.jsonl"):
        items = read_records(path)
        if [_item_key(item) for item in items] == wanted:
            return items
    scorers = load_scorers(run, truth)
    with RecordWriter(path, _item_key) as writer:
        with run.progress("evaluation: sampling held-out responses", len(wanted), len(writer.done)) as progress:
            for system in judged:
                for item in _torn_items(system, scorers, writer, head_chunk(run.config.mesh)):
                    if writer.write_missing(item):
                        progress.advance()
        writer.finish()
        return writer.records


def _torn_items(system: System, scorers: Scorers, writer: RecordWriter, chunk: int) -> Iterator[Item]:
    """Sample and score the responses of a system, of groups that aren't wholly written yet."""
    requests = _requests(system)
    keys = [_key(system.name, request_id) for request_id, _ in requests]
    groups = list(writer.torn_groups(keys, group_size(system.sampling)))
    if not groups:
        return
    model = system.load()
    if system.reference is None:
        answer = _plainly(system, model)
    else:
        answer = _with_log_ratio(system, model, system.reference(), chunk)
    for places in groups:
        group = requests[places.start : places.stop]
        yield from _score_group(system, *answer(group), scorers, group)


def _score_group(
    system: System,
    replies: Sequence[Reply],
    log_ratios: Sequence[float | None],
    scorers: Scorers,
    group: Sequence[tuple[str, Record]],
) -> list[Item]:
    queries = [query for _, query in group]
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
            "kind": None if scorers.truth is None else scorers.truth.kind(query["text"]),
            "system": system.name,
            "sample": int(request_id.rsplit("/", 1)[1]),
            "text": answer.text,
            "finish": answer.finish,
            "gold": None if scorers.truth is None else scorers.truth.score(query["text"], answer.text),
            "reward": float(rewards[index]),
            "as_is": None if as_is is None else float(as_is[index]),
            "kl": log_ratios[index],
        }
        for index, ((request_id, query), answer) in enumerate(zip(group, replies, strict=True))
    ]


def _plainly(system: System, model: Model) -> Answer:
    """Replies of a model, and no log-ratios."""
    responder = Responder(
        model, system.prompt, next_role="assistant", sampling=system.sampling, seed=system.seed
    )

    def answer(group: Sequence[tuple[str, Record]]) -> tuple[list[Reply], list[float | None]]:
        requests = [DialogueRequest(request_id, _asked(query)) for request_id, query in group]
        return list(responder.respond(requests)), [None] * len(group)

    return answer


def _with_log_ratio(system: System, model: Model, reference: Model, chunk: int) -> Answer:
    """Replies, and the log-ratio to the reference summed over the very tokens that were sampled.

    Both sides are scored by the same program at the sampling temperature, so a policy that is the reference gets
    exactly 0; greedy sampling is scored at temperature 1. The head is applied to `chunk` entries at a time (0: all).
    """
    tokenizer, sampling = model.tokenizer, system.sampling
    rules = sampling_rules(sampling, stop_tokens(tokenizer, ()))
    engine = Engine(
        model.params, model.config, rules, engine_settings(sampling), seed=system.seed, prefix_tokens=()
    )

    def answer(group: Sequence[tuple[str, Record]]) -> tuple[list[Reply], list[float | None]]:
        prompts = [prompt_tokens(tokenizer, _asked(query)) for _, query in group]
        requests = [Request(request_id, tuple(prompt)) for (request_id, _), prompt in zip(group, prompts, strict=True)]
        completions = list(in_order(requests, engine.run(requests)))
        sums = [
            [
                float(np.sum(logprobs, dtype=np.float64))
                for logprobs in completion_logprobs(
                    scored.params,
                    shape,
                    prompts,
                    [completion.tokens for completion in completions],
                    temperature=sampling.temperature or 1.0,
                    batch_size=sampling.batch_size,
                    multiple=PROMPT_MULTIPLE,
                )
            ]
            for scored in (model, reference)
            for shape in [replace(scored.config, vocab_chunk=chunk)]
        ]
        replies = [reply(tokenizer, completion, (), False) for completion in completions]
        return replies, [policy - other for policy, other in zip(*sums, strict=True)]

    return answer


def _requests(system: System) -> list[tuple[str, Record]]:
    """(request id, query) of every response of a system, in order."""
    return [(f"{query['id']}/{sample}", query) for query in system.queries for sample in range(system.samples)]


def _asked(query: Record) -> list[Turn]:
    return [{"role": "human", "text": query["text"]}]


def _key(system: str, request_id: str) -> str:
    return f"{system}/{request_id}"


def _item_key(item: Record) -> str:
    return _key(item["system"], f"{item['query_id']}/{item['sample']}")


def trained_model(run: Run, folder: str) -> Model:
    """A model that an earlier stage of the run has saved.

    Raises:
        InputError: it isn't there.
    """
    if not run.exists(folder):
        stage = folder.split("/")[0]
        raise InputError(f"{run.path(folder)}: no such model; the stage {stage} must finish before the evaluation")
    return run.load(folder)


def _snapshots(run: Run, stage: str) -> list[int]:
    """Steps of the policies that a stage of PPO kept."""
    folder: Path = run.path(stage, "policies")
    return from_primary(lambda: sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()))
