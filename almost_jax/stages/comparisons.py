"""Synthetic comparisons: one response per configuration, ranked by the rule of thumb, binarised and filtered.

Two stages: `run_responses` samples (responses.jsonl), `run_stage` pairs and filters (comparisons.jsonl), so that other
filters or pairs cost no new sampling. Source: ALMoST (arXiv 2305.13735), section 2.1 and 2.2.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

import jax
import numpy as np

from almost_jax.config import ComparisonsConfig, FiltersConfig, PromptedModel
from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary
from almost_jax.io.records import Record, RecordWriter, iter_records, read_records
from almost_jax.io.run import Run
from almost_jax.stages.filters import count_verdicts, filter_pair
from almost_jax.stages.prompting import DialogueRequest, Responder
from almost_jax.stages.reward import RewardScorer, load_reward_model
from almost_jax.stages.templates import Turn, demonstrations_text

Rule: TypeAlias = Literal["size", "demonstrations", "shots"]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Two configurations of which the rule of thumb prefers one, and the part of the rule that decides."""

    better: str
    worse: str
    rule: Rule


def rule_of_thumb(name: str, other: str, config: ComparisonsConfig) -> Ranking:
    """Rank two configurations: larger model, then better demonstrations, then more shots (the first that differs).

    Raises:
        InputError: a model or demonstrations are in neither order, or the configurations differ in nothing.
    """
    first, second = config.configurations[name], config.configurations[other]
    merits: tuple[tuple[Rule, int, int], ...] = (
        ("size", _place(name, "model", config), _place(other, "model", config)),
        ("demonstrations", _place(name, "demonstrations", config), _place(other, "demonstrations", config)),
        ("shots", -first.shots, -second.shots),
    )
    for rule, ours, theirs in merits:
        if ours != theirs:
            return Ranking(name, other, rule) if ours < theirs else Ranking(other, name, rule)
    raise InputError(f"comparisons.configurations: {name} and {other} are the same; one of them must go or change")


def rankings(config: ComparisonsConfig) -> list[Ranking]:
    """The pairs of configurations to compare: neighbours or all, best first.

    Raises:
        InputError: the order of the configurations contradicts the rule of thumb.
    """
    names = list(config.configurations)
    if len(names) < 2:
        raise InputError(f"comparisons.configurations: {len(names)} given; at least two are needed to compare")
    found = []
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            ranking = rule_of_thumb(name, other, config)
            if ranking.better != name:
                raise InputError(
                    f"comparisons.configurations: {other} comes after {name}, but is better by {ranking.rule}; "
                    f"list the configurations best first"
                )
            if config.pairs == "all" or other == names[index + 1]:
                found.append(ranking)
    return found


def make_pairs(
    query_id: str,
    texts: Mapping[str, str],
    scores: Mapping[str, float],
    ranked: Sequence[Ranking],
) -> list[dict[str, Any]]:
    """Binarise one query's responses.

    Args:
        query_id: the query's id.
        texts: the response of every configuration.
        scores: the as-is reward model's score of every text that it scored.
        ranked: the pairs of configurations to make.

    Returns:
        Records {query_id, chosen {configuration, text}, rejected {...}, rule, as_is_margin}; the margin is the score of
        the chosen text minus that of the rejected one, None unless both were scored.
    """
    pairs = []
    for ranking in ranked:
        chosen, rejected = texts[ranking.better], texts[ranking.worse]
        scored = chosen in scores and rejected in scores
        pairs.append(
            {
                "query_id": query_id,
                "chosen": {"configuration": ranking.better, "text": chosen},
                "rejected": {"configuration": ranking.worse, "text": rejected},
                "rule": ranking.rule,
                "as_is_margin": scores[chosen] - scores[rejected] if scored else None,
            }
        )
    return pairs


def run_responses(run: Run) -> dict[str, Any]:
    """Sample one response per configuration and query: queries.jsonl -> responses.jsonl.

    Models are loaded one after another. A killed run goes on from the group of batches in which it was killed, which is
    sampled again as a whole, so that the file comes out the same to the byte; a finished file stays as it is.

    Raises:
        InputError: the configurations contradict the rule of thumb, or the unfinished file is another run's.
    """
    rankings(run.config.comparisons)
    queries = read_records(run.path("queries.jsonl"))
    plan = by_model(run.config.comparisons.configurations)
    expected = [response_key({"configuration": name, "query_id": query["id"]}) for name in plan for query in queries]
    path = run.path("responses.jsonl")
    if from_primary(lambda: path.is_file() and [response_key(record) for record in iter_records(path)] == expected):
        # The stage was stopped after this file: what is finished isn't sampled again.
        return _responses_summary(iter_records(path), list(run.config.comparisons.configurations))
    with RecordWriter(path, key=response_key) as writer:
        _check_resumed(map(response_key, writer.written()), iter(expected), f"{path}.partial")
        done = len(writer.done)
        with run.progress("responses", len(plan) * len(queries), done) as progress, jax.set_mesh(run.sampling_mesh):
            for place, name in enumerate(plan):
                already = min(max(done - place * len(queries), 0), len(queries))
                for record in respond_as(run, "responses", name, queries, already):
                    writer.write(record)
                    progress.advance()
        writer.finish()
    return _responses_summary(iter_records(path), list(run.config.comparisons.configurations))


def run_stage(run: Run) -> dict[str, Any]:
    """Pair and filter: queries.jsonl and responses.jsonl -> comparisons.jsonl.

    The as-is reward model scores every response that is not empty, also of pairs that an earlier filter drops, so that
    the filters can be audited. Dropped pairs stay in the file. A finished file stays as it is if the filters would give
    what it holds.

    Raises:
        InputError: responses are missing, or the unfinished file is another run's.
    """
    ranked = rankings(run.config.comparisons)
    queries = read_records(run.path("queries.jsonl"))
    responses = Responses(run.path("responses.jsonl"), list(run.config.comparisons.configurations), queries)
    chunk = run.config.as_is_reward.training.batch_size
    path = run.path("comparisons.jsonl")
    if from_primary(lambda: path.is_file() and _is_finished(path, queries, responses, ranked, run.config.filters)):
        return _comparisons_summary(path)
    scorer = None
    if run.config.filters.as_is:
        scorer = RewardScorer(load_reward_model(run, "as_is_reward", alone=True), chunk, run.say)
    expected = (f"{query['id']}/{ranking.better}/{ranking.worse}" for query in queries for ranking in ranked)
    with RecordWriter(path, key=comparison_key) as writer:
        _check_resumed(map(comparison_key, writer.written()), expected, f"{path}.partial")
        done = len(writer.done)
        with run.progress("comparisons", len(queries) * len(ranked), done) as progress, jax.set_mesh(run.sampling_mesh):
            # Whole chunks are scored again after a kill: what is scored together stays together.
            first = done // (chunk * len(ranked)) * chunk
            skip = done - first * len(ranked)
            texts = islice(responses.by_query(), first, None)
            for start in range(first, len(queries), chunk):
                part = list(zip(queries[start : start + chunk], texts, strict=False))
                for record in _compare(run, part, ranked, scorer)[skip:]:
                    writer.write(record)
                    progress.advance()
                skip = 0
        writer.finish()
    return _comparisons_summary(path)


class Responses:
    """The texts of responses.jsonl by query, read as they are needed: one query's responses are in memory at a time."""

    def __init__(self, path: Path, names: Sequence[str], queries: Sequence[Mapping[str, Any]]) -> None:
        """Find where the responses of each configuration begin, and that none is missing.

        Args:
            path: responses.jsonl, whose records stand configuration by configuration, each in the order of the queries.
            names: the configurations to read; others are passed over.
            queries: the records of queries.jsonl.

        Raises:
            InputError: a response is missing, or the file is in another order.
        """
        self._path = path
        self._starts: dict[str, int] = {}
        counts = dict.fromkeys(names, 0)
        with path.open("rb") if path.is_file() else _missing(path) as file:
            place = 0
            for line, record in zip(file, iter_records(path), strict=False):
                name = record["configuration"]
                if name in counts:
                    self._starts.setdefault(name, place)
                    number = counts[name]
                    if number >= len(queries) or queries[number]["id"] != record["query_id"]:
                        raise InputError(
                            f"{path}: configuration {name} has query {record['query_id']} where response {number + 1} "
                            "should be; its responses are to other queries: sample them anew"
                        )
                    counts[name] += 1
                place += len(line)
        for name, count in counts.items():
            if count < len(queries):
                missing = queries[count]["id"]
                raise InputError(f"{path}: lacks configuration {name}'s response to query {missing}; sample them anew")
        self._count = len(queries)

    def by_query(self) -> Iterator[dict[str, str]]:
        """The text of every configuration, query by query in their order."""
        with ExitStack() as stack:
            files = {name: stack.enter_context(self._path.open("rb")) for name in self._starts}
            for name, file in files.items():
                file.seek(self._starts[name])
            for _ in range(self._count):
                yield {name: json.loads(file.readline())["text"] for name, file in files.items()}


def response_key(record: Mapping[str, Any]) -> str:
    """What makes a response record unique."""
    return f"{record['configuration']}/{record['query_id']}"


def comparison_key(record: Mapping[str, Any]) -> str:
    """What makes a comparison record unique."""
    return f"{record['query_id']}/{record['chosen']['configuration']}/{record['rejected']['configuration']}"


def _place(name: str, field: Literal["model", "demonstrations"], config: ComparisonsConfig) -> int:
    """Where a configuration's model or demonstrations stand in their order, 0 being the best."""
    order = config.model_order if field == "model" else config.demonstrations_order
    value: str = getattr(config.configurations[name], field)
    if value not in order:
        raise InputError(
            f"comparisons.{field}_order: {list(order)} lacks {value!r}, which configuration {name} uses; add it"
        )
    return order.index(value)


def by_model(configurations: Mapping[str, PromptedModel]) -> list[str]:
    """The configurations with those of one model next to each other, in the order of their first appearance."""
    models = list(dict.fromkeys(prompted.model for prompted in configurations.values()))
    return sorted(configurations, key=lambda name: models.index(configurations[name].model))


def _check_resumed(done: Iterable[str], expected: Iterator[str], path: str) -> None:
    """Refuse to go on from a file that holds anything but the beginning of what would be written."""
    if any(key != next(expected, None) for key in done):
        raise InputError(f"{path}: was begun with other queries or configurations; delete it to start anew")


def respond_as(
    run: Run, stage: str, name: str, queries: Sequence[Mapping[str, Any]], already: int
) -> Iterator[dict[str, Any]]:
    """The response records of one configuration to each query after the first `already`, for a stage."""
    if already == len(queries):
        return
    prompted = run.config.comparisons.configurations[name]
    sampling = run.config.comparisons.sampling
    seed = run.seed(f"responses/{name}")
    requests = [DialogueRequest(query["id"], [{"role": "human", "text": query["text"]}]) for query in queries]
    responder = Responder(
        run.model(prompted.model), demonstrations_text(prompted), next_role="assistant", sampling=sampling, seed=seed
    )
    for reply in responder.respond_from(requests, already):
        yield {
            "query_id": reply.id,
            "configuration": name,
            "model": prompted.model,
            "demonstrations": prompted.demonstrations,
            "shots": prompted.shots,
            "text": reply.text,
            "tokens": reply.tokens,
            "seed": seed,
            "finish": reply.finish,
        }
    run.say(f"{stage}: {name}: {responder.stats.line()}")


def _compare(
    run: Run,
    answered: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
    ranked: Sequence[Ranking],
    scorer: RewardScorer | None,
) -> list[dict[str, Any]]:
    """The filtered pairs of some queries, each given with its text of every configuration."""
    scores: dict[str, dict[str, float]] = {query["id"]: {} for query, _ in answered}
    if scorer is not None:
        asked = [(query, text) for query, texts in answered for text in dict.fromkeys(texts.values()) if text]
        dialogues: list[list[Turn]] = [
            [{"role": "human", "text": query["text"]}, {"role": "assistant", "text": text}] for query, text in asked
        ]
        values = scorer.score(dialogues) if dialogues else np.zeros((0,), np.float32)
        for (query, text), value in zip(asked, values, strict=True):
            scores[query["id"]][text] = float(value)
    records = []
    for query, own in answered:
        pairs = make_pairs(query["id"], own, scores[query["id"]], ranked)
        records += [filter_pair(pair, list(own.values()), run.config.filters) for pair in pairs]
    return records


def _is_finished(
    path: Path,
    queries: Sequence[Mapping[str, Any]],
    responses: Responses,
    ranked: Sequence[Ranking],
    filters: FiltersConfig,
) -> bool:
    """Whether comparisons.jsonl has every pair of these responses, judged by these filters.

    The margins are taken as they stand there.
    """
    records = iter_records(path)
    for query, texts in zip(queries, responses.by_query(), strict=True):
        for pair in make_pairs(query["id"], texts, {}, ranked):
            record = next(records, None)
            if record is None:
                return False
            pair["as_is_margin"] = record.get("as_is_margin")
            scored = filters.as_is and bool(pair["chosen"]["text"] and pair["rejected"]["text"])
            if scored != (pair["as_is_margin"] is not None):
                return False
            if record != filter_pair(pair, list(texts.values()), filters):
                return False
    return next(records, None) is None


def _missing(path: Path) -> NoReturn:
    raise InputError(f"{path}: there is no such file; the stage responses writes it")


def _responses_summary(records: Iterable[Record], names: Sequence[str]) -> dict[str, Any]:
    """Per configuration: mean length, and how many responses are empty or ran out of tokens."""
    fields = ("responses", "tokens", "characters", "empty", "unfinished")
    sums = {name: Counter(dict.fromkeys(fields, 0)) for name in names}
    for record in records:
        text = record["text"]
        own = {"responses": 1, "tokens": record["tokens"], "characters": len(text)}
        sums[record["configuration"]].update({**own, "empty": not text, "unfinished": record["finish"] == "length"})
    return {
        "responses": sum(own["responses"] for own in sums.values()),
        **{
            name: {
                "mean_tokens": own["tokens"] / own["responses"] if own["responses"] else None,
                "mean_characters": own["characters"] / own["responses"] if own["responses"] else None,
                "empty": own["empty"],
                "unfinished": own["unfinished"],
            }
            for name, own in sums.items()
        },
    }


def _comparisons_summary(path: Path) -> dict[str, Any]:
    """What each filter dropped, how often the as-is model agrees, and which rules the kept pairs come from."""
    kept_by_rule: Counter[str] = Counter()
    scored: Counter[bool] = Counter()
    for record in iter_records(path):
        if record["kept"]:
            kept_by_rule[record["rule"]] += 1
        if record["as_is_margin"] is not None:
            scored[record["as_is_margin"] > 0] += 1
    return {
        **count_verdicts(iter_records(path)),
        "as_is_agreement": scored[True] / scored.total() if scored else None,
        "kept_by_rule": dict(sorted(kept_by_rule.items())),
    }
