"""Self-play between a prompted assistant and a prompted user, guided by the reward model.

From a query on, assistant and user take turns. At each assistant turn n responses are sampled and the one that the
reward model scores best is kept; n = 1 without a reward model is plain self-play, the ablation. Source: ALMoST (arXiv
2305.13735), section 2.3.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import jax

from almost_jax.config import DemonstrationsConfig, PromptedModel, SamplingConfig
from almost_jax.errors import InputError
from almost_jax.io.models import Model
from almost_jax.io.records import Record, RecordWriter, read_records
from almost_jax.io.run import Run
from almost_jax.sampling.selection import best_of
from almost_jax.stages.prompting import DialogueRequest, Reply, Responder, group_size
from almost_jax.stages.reward import RewardScorer, load_reward_model
from almost_jax.stages.templates import Role, Turn, demonstrations_text


@dataclasses.dataclass
class Dialogue:
    """A dialogue being played. `candidates` has one entry per turn; `open` says whether it goes on.

    `outgrown`: it ended since it and the longest next turn no longer fit into a speaker's positions.
    """

    query_id: str
    turns: list[Turn]
    candidates: list[list[dict[str, Any]]]
    open: bool = True
    outgrown: bool = False

    def add(self, role: Role, text: str, candidates: list[dict[str, Any]]) -> None:
        """Append a turn."""
        self.turns.append({"role": role, "text": text})
        self.candidates.append(candidates)

    def end(self, outgrown: bool = False) -> None:
        """Let it go on no further; a user's turn that answers the assistant goes unless it was answered itself."""
        self.open, self.outgrown = False, outgrown
        if len(self.turns) > 1 and self.turns[-1]["role"] == "human":
            self.turns.pop()
            self.candidates.pop()


@dataclasses.dataclass
class Speaker:
    """One side of the self-play: who answers, how, and with which randomness.

    The model is loaded when it is its turn: where the two sides are different large models, only one is in memory. With
    `lasting` it stays, with its few-shot prompt and what requests ask to keep; both sides must then be one model.
    """

    load: Callable[[], Model]
    demonstrations: str
    sampling: SamplingConfig
    seed: int
    lasting: bool
    _responder: Responder | None = None

    def responder(self, role: Role) -> Responder:
        """The model as one that gives turns of a role."""
        responder = self._responder or Responder(
            self.load(), self.demonstrations, next_role=role, sampling=self.sampling, seed=self.seed
        )
        if self.lasting:
            self._responder = responder
        return responder

    def reply(self, requests: Sequence[DialogueRequest], role: Role) -> Iterable[Reply | None]:
        """The next turn of every dialogue, in their order, as they finish; None where it may not fit."""
        responder = self.responder(role)
        if not self.lasting:
            requests = [dataclasses.replace(request, keep=False, parent=None) for request in requests]
        return responder.respond_where_it_fits(requests)

    def figures(self) -> str:
        """What it has sampled, in one line; "" where it was loaded anew for every turn."""
        return "" if self._responder is None else self._responder.stats.line()

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Free what is kept of some requests, or of all."""
        if self._responder is not None:
            self._responder.forget(ids)


def run_stage(run: Run) -> dict[str, Any]:
    """Play guided, and plain for the baseline: queries.jsonl, reward/model -> demonstrations(_self_play).jsonl."""
    config = run.config.demonstrations
    with jax.set_mesh(run.sampling_mesh):
        model = load_reward_model(run, "reward", alone=True)
        scorer = RewardScorer(model, run.config.reward.training.batch_size, run.say)
        summary = {"guided": play(run, "demonstrations", config.n, scorer)}
        if config.baseline:
            summary["self_play"] = play(run, "demonstrations_self_play", 1, None)
    return summary


def play(run: Run, name: str, n: int, scorer: RewardScorer | None) -> dict[str, Any]:
    """Play one dialogue per query and write them to NAME.jsonl, chunk by chunk.

    A killed run goes on from the chunk in which it was killed, which is played again as a whole, so that the file comes
    out the same to the byte.

    Args:
        run: the run.
        name: the file, and with the run's seed the source of randomness.
        n: candidates per assistant turn.
        scorer: chooses among them; None takes the first and leaves its score null.

    Returns:
        The summary.

    Raises:
        InputError: the unfinished file is another run's, or no query leaves room for an answer.
    """
    config = run.config.demonstrations
    evaluation = evaluation_queries(run)
    queries = [
        query for query in read_records(run.path("queries.jsonl")) if plain_text(query["text"]) not in evaluation
    ][: config.queries]
    path = run.path(f"{name}.jsonl")
    expected = [query["id"] for query in queries]
    if run.exists(f"{name}.jsonl") and [record["query_id"] for record in read_records(path)] == expected:
        # The stage was stopped after this file: what is finished isn't played again.
        return summarize(read_records(path))
    if len(queries) < config.queries:
        run.say(
            f"{name}: {len(queries)} dialogues instead of the {config.queries} of demonstrations.queries; each query "
            "begins one, and there are no more"
        )
    lasting = config.assistant.model == config.user.model
    assistant = _speaker(run, config.assistant, config.sampling, f"{name}/assistant", lasting)
    user = _speaker(run, config.user, config.user_sampling, f"{name}/user", lasting)
    chunk = _played_at_once(config, lasting)
    if queries:
        _check_some_fit(queries, assistant)
    with RecordWriter(path, key=lambda record: record["query_id"]) as writer:
        if not writer.done <= set(expected):
            raise InputError(f"{path}.partial: was begun with other queries; delete it to start anew")
        torn = [queries[places.start : places.stop] for places in writer.torn_groups(expected, chunk)]
        turns = _turns(config)
        played = len(queries) - sum(map(len, torn))
        with run.progress(f"{name}: turns", len(queries) * turns, played * turns) as progress:
            for part in torn:
                for dialogue in play_chunk(part, assistant, user, n, config, scorer, evaluation, progress.advance):
                    writer.write_missing(demonstration_record(dialogue))
        writer.finish()
    for role, speaker in (("assistant", assistant), ("user", user)):
        if speaker.figures():
            run.say(f"{name}: {role}: {speaker.figures()}")
    summary = summarize(read_records(path))
    if summary["outgrown"]:
        run.say(
            f"{name}: {summary['outgrown']} of {len(queries)} dialogues ended early since another turn might not fit "
            "into the model's positions; fewer shots or a lower max_new_tokens leave more room"
        )
    return summary


def play_chunk(
    queries: Sequence[Record],
    assistant: Speaker,
    user: Speaker,
    n: int,
    config: DemonstrationsConfig,
    scorer: RewardScorer | None,
    evaluation: frozenset[str],
    advance: Callable[[int], None],
) -> list[Dialogue]:
    """Play one dialogue per query, all of them turn by turn.

    A dialogue ends after `max_turns` assistant turns, at a user turn that is empty, says farewell or is an evaluation
    query, when no candidate says anything, or when another turn may not fit into the speaker's positions. The last turn
    is the assistant's, save in a dialogue that never got an answer. `advance` is told of turns as they are said, and of
    all that a dialogue might have had when it ends early.
    """
    dialogues = [
        Dialogue(query["id"], [{"role": "human", "text": query["text"]}], [[]]) for query in queries
    ]
    # The request whose cache holds a dialogue so far, on either side.
    heard: dict[str, str] = {}
    said: dict[str, str] = {}
    for turn in range(config.max_turns):
        playing = [dialogue for dialogue in dialogues if dialogue.open]
        keep = config.reuse_cache and turn + 1 < config.max_turns
        if turn:
            requests = [
                DialogueRequest(name, dialogue.turns, keep=keep, parent=heard.get(dialogue.query_id))
                for dialogue in playing
                for name in [f"{dialogue.query_id}/{turn}"]
            ]
            before = list(heard.values())
            heard = {dialogue.query_id: f"{dialogue.query_id}/{turn}" for dialogue in playing} if keep else {}
            for dialogue, asked in zip(playing, user.reply(requests, "human"), strict=True):
                advance(1)
                if asked is None:
                    dialogue.end(outgrown=True)
                elif _goes_on(asked.text, config.farewells, evaluation):
                    dialogue.add("human", asked.text, [])
                else:
                    dialogue.end()
            user.forget(before)
            playing = _still_open(playing, _turns(config) - 2 * turn, advance)
        requests = [
            DialogueRequest(f"{name}/{turn}/{candidate}", dialogue.turns, keep, said.get(name))
            for name, dialogue in ((dialogue.query_id, dialogue) for dialogue in playing)
            for candidate in range(n)
        ]
        answers: list[Reply | None] = []
        for answer in assistant.reply(requests, "assistant"):
            answers.append(answer)
            if len(answers) % n == 0:
                advance(1)
        left = _turns(config) - 2 * turn - 1
        for place, dialogue in enumerate(playing):
            if answers[place * n] is None:
                dialogue.end(outgrown=True)
        playing = _still_open(playing, left, advance)
        texts = [answer.text for answer in answers if answer is not None]
        assistant.forget(said.values())
        said = {}
        for dialogue, candidates in zip(playing, _scored(playing, texts, n, scorer), strict=True):
            chosen = choose(candidates)
            if chosen is None:
                dialogue.end()
            else:
                dialogue.add("assistant", chosen, candidates)
                place = [candidate["text"] for candidate in candidates].index(chosen)
                if keep:
                    said[dialogue.query_id] = f"{dialogue.query_id}/{turn}/{place}"
        playing = _still_open(playing, left, advance)
        # What the other candidates said leads nowhere.
        assistant.forget({request.id for request in requests} - set(said.values()))
    assistant.forget()
    user.forget()
    return dialogues


def says_farewell(text: str, farewells: Collection[str]) -> bool:
    """Whether a user's turn begins or ends with one of the farewells, whatever its case and punctuation.

    "Thanks, bye!" does; "Write a goodbye card." doesn't.
    """
    words = re.findall(r"[\w'-]+", text.lower().replace("\u2019", "'"))
    for farewell in farewells:
        phrase = farewell.lower().split()
        if phrase in (words[: len(phrase)], words[-len(phrase) :]):
            return True
    return False


def choose(candidates: Sequence[dict[str, Any]]) -> str | None:
    """The best-scored candidate that says anything (unscored: the first), in any order; None if all are empty."""
    speaking = [candidate for candidate in candidates if candidate["text"]]
    if not speaking:
        return None
    if speaking[0]["score"] is None:
        return str(speaking[0]["text"])
    texts = [candidate["text"] for candidate in speaking]
    return texts[best_of(texts, [candidate["score"] for candidate in speaking])]


def demonstration_record(dialogue: Dialogue) -> Record:
    """A dialogue as demonstrations.jsonl has it; only one that has outgrown the positions says so."""
    turns = zip(dialogue.turns, dialogue.candidates, strict=True)
    return {
        "query_id": dialogue.query_id,
        "turns": [{"role": turn["role"], "text": turn["text"], "candidates": own} for turn, own in turns],
        **({"outgrown": True} if dialogue.outgrown else {}),
    }


def demonstration_turns(record: Record) -> list[Turn]:
    """The dialogue of a record, without candidates."""
    return [{"role": turn["role"], "text": turn["text"]} for turn in record["turns"]]


def is_answered(record: Record) -> bool:
    """Whether a demonstration has an answer, and so can be learned from."""
    return record["turns"][-1]["role"] == "assistant"


def evaluation_queries(run: Run) -> frozenset[str]:
    """The texts that no demonstration may contain as a human turn; none if evaluation_queries.jsonl is missing."""
    if not run.exists("evaluation_queries.jsonl"):
        return frozenset()
    return frozenset(plain_text(record["text"]) for record in read_records(run.path("evaluation_queries.jsonl")))


def plain_text(text: str) -> str:
    """A text as decontamination compares it: lower case, single spaces."""
    return " ".join(text.lower().split())


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """How many dialogues and turns there are, how many went unanswered, and the mean score of kept and of all.

    `outgrown` counts the dialogues that ended since another turn may not have fitted into a model's positions.
    """
    turns = [turn for record in records for turn in record["turns"] if turn["role"] == "assistant"]
    scored = [turn for turn in turns if turn["candidates"][0]["score"] is not None]
    everything = [candidate["score"] for turn in scored for candidate in turn["candidates"]]
    kept = [
        max(candidate["score"] for candidate in turn["candidates"] if candidate["text"] == turn["text"])
        for turn in scored
    ]
    return {
        "dialogues": len(records),
        "unanswered": sum(not is_answered(record) for record in records),
        "outgrown": sum(record.get("outgrown", False) for record in records),
        "assistant_turns": len(turns),
        "mean_score_kept": sum(kept) / len(kept) if kept else None,
        "mean_score_candidates": sum(everything) / len(everything) if everything else None,
    }


def _check_some_fit(queries: Sequence[Record], assistant: Speaker) -> None:
    """Refuse queries none of which leaves room for an answer."""
    responder = assistant.responder("assistant")
    asked: list[list[Turn]] = [[{"role": "human", "text": query["text"]}] for query in queries]
    if not any(responder.fits(turns) for turns in asked):
        shortest = min(asked, key=lambda turns: len(turns[0]["text"]))
        raise InputError(f"demonstrations: no query leaves room for an answer, not even {responder.too_long(shortest)}")


def _speaker(run: Run, prompted: PromptedModel, sampling: SamplingConfig, seed: str, lasting: bool) -> Speaker:
    load = partial(run.model, prompted.model)
    return Speaker(load, demonstrations_text(prompted), sampling, run.seed(seed), lasting)


def _played_at_once(config: DemonstrationsConfig, lasting: bool) -> int:
    """How many dialogues are played at once: as many as keep slots full, where that takes no memory."""
    both = config.sampling, config.user_sampling
    if lasting and config.reuse_cache and config.max_turns > 1:
        return max(sampling.batch_size for sampling in both)
    return max(map(group_size, both))


def _turns(config: DemonstrationsConfig) -> int:
    """The turns that a dialogue may have behind its query."""
    return 2 * config.max_turns - 1


def _still_open(dialogues: Sequence[Dialogue], left: int, advance: Callable[[int], None]) -> list[Dialogue]:
    """Those that go on; `advance` is told of the `left` turns that each of the others won't have."""
    found = [dialogue for dialogue in dialogues if dialogue.open]
    ended = len(dialogues) - len(found)
    if ended and left:
        advance(ended * left)
    return found


def _goes_on(asked: str, farewells: Collection[str], evaluation: frozenset[str]) -> bool:
    return bool(asked) and not says_farewell(asked, farewells) and plain_text(asked) not in evaluation


def _scored(
    dialogues: Sequence[Dialogue], texts: Sequence[str], n: int, scorer: RewardScorer | None
) -> list[list[dict[str, Any]]]:
    """Per dialogue its n candidates {text, score}."""
    if scorer is None:
        scores: list[float | None] = [None] * len(texts)
    else:
        answered: list[list[Turn]] = [
            [*dialogues[place // n].turns, {"role": "assistant", "text": text}] for place, text in enumerate(texts)
        ]
        scores = [float(score) for score in scorer.score(answered)]
    candidates = [{"text": text, "score": score} for text, score in zip(texts, scores, strict=True)]
    return [candidates[place * n : (place + 1) * n] for place in range(len(dialogues))]
