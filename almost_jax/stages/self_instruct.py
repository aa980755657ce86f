"""Self-Instruct: a vanilla model goes on with numbered lists of requests, and what is new and answerable is kept.

Sources: Wang et al., Self-Instruct (2023); ALMoST (arXiv 2305.13735), section 2.1 and appendix.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from almost_jax.config import SelfInstructConfig
from almost_jax.errors import InputError
from almost_jax.io.models import Model
from almost_jax.io.records import Record, RecordWriter, read_records, write_records
from almost_jax.io.run import Run
from almost_jax.sampling.engine import Request, generate
from almost_jax.stages.instructions import (
    REJECTIONS,
    Candidate,
    Rejection,
    list_prompt,
    load_instructions,
    parse_list,
    reject,
)
from almost_jax.stages.prompting import engine_settings, sampling_rules, stop_tokens
from almost_jax.stages.similarity import SimilarityPool

HEADER = (
    "People ask a helpful assistant all kinds of things. The assistant can only read and write text. "
    "Here is a list of very different requests, each complete in itself:\n\n"
)


def self_instruct(run: Run, query_id: Callable[[str], str]) -> dict[str, Any]:
    """Grow the seeds to `queries.count` queries and write queries.jsonl.

    Works in rounds. Every request of a round is prompted from what was accepted before the round, and a finished round
    is one line of self_instruct/rounds.jsonl with every candidate and its verdict; so a killed run repeats at most one
    round, and rejections can be audited.

    Args:
        run: the run; `queries.self_instruct` is read.
        query_id: the id of a text.

    Returns:
        Figures: queries, seeds, rounds, candidates, and the candidates rejected for each reason.

    Raises:
        InputError: the seeds don't suffice for a prompt, or the unfinished file is another run's.
    """
    config, count = run.config.queries.self_instruct, run.config.queries.count
    seeds = [" ".join(text.split()) for text in load_instructions(config.seeds)]
    if len(seeds) < config.in_context:
        raise InputError(
            f"{config.seeds}: has {len(seeds)} instructions, but self_instruct.in_context is {config.in_context}"
        )
    seed = run.seed("self_instruct")
    fingerprint = _fingerprint(config, seed, seeds)
    pool = Pool(seeds, config, query_id)
    finished = _finished(run, config, count, fingerprint)
    if finished is not None:
        # The stage was stopped behind its files: what is finished isn't generated again.
        return _summary(*finished)
    with RecordWriter(run.path("self_instruct", "rounds.jsonl"), key=lambda record: str(record["round"])) as writer:
        number_done = 0
        for number, record in enumerate(writer.written()):
            if (record["round"], record["fingerprint"]) != (number, fingerprint):
                raise InputError(f"{writer.path}.partial: was begun with other settings; delete it to start anew")
            pool.accepted_again(record)
            number_done = number + 1
        with run.progress("queries", count, min(len(pool), count)) as progress, jax.set_mesh(run.sampling_mesh):
            for number in range(number_done, config.max_rounds):
                if len(pool) >= count:
                    break
                before = len(pool)
                completions = _complete(run.model(config.generator), pool, config, seed, number)
                candidates = _judge(completions, pool, count, number)
                writer.write({"round": number, "fingerprint": fingerprint, "candidates": candidates})
                progress.advance(len(pool) - before, accepted=(len(pool) - before) / max(len(candidates), 1))
        queries = pool.queries[:count]
        if len(queries) < count:
            run.say(
                f"queries: {len(queries)} instead of {count}: self_instruct.max_rounds {config.max_rounds} is used up"
            )
        # The rounds keep their unfinished name until the queries are written: a kill in between repeats nothing.
        write_records(run.path("queries.jsonl"), queries)
        rounds = list(writer.records)
        writer.finish()
    return _summary(rounds, queries)


class Pool:
    """Seeds and accepted requests: what prompts are drawn from and what new requests are compared with."""

    def __init__(self, seeds: Sequence[str], config: SelfInstructConfig, query_id: Callable[[str], str]) -> None:
        """A pool of the seeds alone."""
        self.seeds = list(seeds)
        self.generated: list[str] = []
        self.queries: list[dict[str, Any]] = []
        self._config = config
        self._query_id = query_id
        self._similar = SimilarityPool()
        self._ids: set[str] = set()
        for text in seeds:
            self._add(text, "seed", config.seeds)

    def __len__(self) -> int:
        """Seeds and accepted requests together."""
        return len(self.queries)

    def consider(self, candidate: Candidate, origin: str) -> tuple[Rejection | None, float | None]:
        """Accept or reject a request.

        Returns:
            The reason for rejecting it, None if it was accepted; and the ROUGE-L to the most similar text if that is
            the reason.
        """
        reason = reject(candidate, self._config)
        if reason is not None:
            return reason, None
        if self._query_id(candidate.text) in self._ids:
            return "duplicate", None
        nearest = self._similar.most_similar(candidate.text, self._config.max_similarity)
        if nearest is not None:
            return "near_duplicate", nearest[1]
        self._accept(candidate.text, origin)
        return None, None

    def accepted_again(self, record: Mapping[str, Any]) -> None:
        """Take in what an earlier process accepted in a round."""
        for candidate in record["candidates"]:
            if candidate["rejected"] is None:
                self._accept(candidate["text"], _origin(record["round"], candidate["request"]))

    def examples(self, rng: random.Random) -> list[str]:
        """Requests to show: some generated ones, as far as there are any, the rest seeds, shuffled."""
        generated = min(self._config.in_context_generated, self._config.in_context, len(self.generated))
        shown = rng.sample(self.generated, generated) + rng.sample(self.seeds, self._config.in_context - generated)
        rng.shuffle(shown)
        return shown

    def _accept(self, text: str, origin: str) -> None:
        self.generated.append(text)
        self._add(text, "generated", origin)

    def _add(self, text: str, source: str, origin: str) -> None:
        identifier = self._query_id(text)
        self._ids.add(identifier)
        self._similar.add(text)
        self.queries.append({"id": identifier, "text": text, "source": source, "origin": origin})


def _complete(
    model: Model, pool: Pool, config: SelfInstructConfig, seed: int, round_number: int
) -> list[list[Candidate]]:
    """One round: the requests parsed from every completion."""
    tokenizer = model.tokenizer
    prefix = tokenizer.begin + tokenizer.encode(HEADER)
    room = model.config.max_position_embeddings - len(prefix) - config.sampling.max_new_tokens
    requests, firsts = [], []
    for index in range(config.requests_per_round):
        name = _origin(round_number, index)
        examples = pool.examples(random.Random(f"{seed}/{name}"))
        prompt = tokenizer.encode_behind(list_prompt(examples), plain=True)
        # Long requests may not all fit; the longest goes first.
        while len(prompt) > room and len(examples) > 1:
            examples.remove(max(examples, key=len))
            prompt = tokenizer.encode_behind(list_prompt(examples), plain=True)
        requests.append(Request(name, tuple(prompt)))
        firsts.append(len(examples) + 1)
    completions = generate(
        model.params,
        model.config,
        requests,
        sampling_rules(config.sampling, stop_tokens(tokenizer, ())),
        engine_settings(config.sampling),
        seed=seed,
        prefix_tokens=prefix,
    )
    return [
        parse_list(tokenizer.decode(list(completion.content)), first, completion.stopped)
        for completion, first in zip(completions, firsts, strict=True)
    ]


def _judge(
    completions: Sequence[Sequence[Candidate]], pool: Pool, count: int, round_number: int
) -> list[dict[str, Any]]:
    """Every candidate's verdict, in order, until the pool is full."""
    verdicts: list[dict[str, Any]] = []
    for index, candidates in enumerate(completions):
        for candidate in candidates:
            if len(pool) >= count:
                return verdicts
            rejected, similarity = pool.consider(candidate, _origin(round_number, index))
            verdict = {"request": index, "text": candidate.text, "rejected": rejected}
            verdicts.append(verdict if similarity is None else {**verdict, "similarity": similarity})
    return verdicts


def _origin(round_number: int, request: int) -> str:
    return f"round {round_number}, request {request}"


def _finished(
    run: Run, config: SelfInstructConfig, count: int, fingerprint: str
) -> tuple[list[Record], list[Record]] | None:
    """The rounds and the queries, where both files are whole and of these settings."""
    if not (run.exists("self_instruct", "rounds.jsonl") and run.exists("queries.jsonl")):
        return None
    rounds = read_records(run.path("self_instruct", "rounds.jsonl"))
    if any(record["fingerprint"] != fingerprint for record in rounds):
        return None
    queries = read_records(run.path("queries.jsonl"))
    return (rounds, queries) if len(queries) == count or len(rounds) == config.max_rounds else None


def _fingerprint(config: SelfInstructConfig, seed: int, seeds: Sequence[str]) -> str:
    """What must be the same for a stopped run to go on; more rounds are no other run."""
    settings = config.model_dump_json(exclude={"max_rounds": True, "sampling": {"group_batches"}})
    return hashlib.sha256("\n".join([settings, str(seed), HEADER, *seeds]).encode()).hexdigest()[:16]


def _summary(rounds: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    verdicts = Counter(candidate["rejected"] for record in rounds for candidate in record["candidates"])
    return {
        "queries": len(queries),
        "seeds": sum(query["source"] == "seed" for query in queries),
        "rounds": len(rounds),
        "candidates": sum(verdicts.values()),
        "rejected": {reason: verdicts[reason] for reason in REJECTIONS},
    }
