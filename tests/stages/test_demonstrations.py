"""Self-play: the best candidate is kept whatever their order, dialogues end where they should, exact resume."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almost_jax.config import DemonstrationsConfig
from almost_jax.errors import InputError
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages import demonstrations, reward
from almost_jax.stages.demonstrations import Speaker, play_chunk, says_farewell
from almost_jax.stages.prompting import DialogueRequest, Reply
from almost_jax.stages.templates import Role, Turn


class Stopped(Exception):
    """What a kill looks like from inside."""


class Scripted(Speaker):
    """A speaker whose replies are given by a function of the request's id; None is for want of positions."""

    def __init__(self, script: Callable[[str], str | None]) -> None:
        self.script, self.lasting, self._responder = script, True, None
        self.asked: list[tuple[str, list[Turn]]] = []

    def reply(self, requests: Sequence[DialogueRequest], role: Role) -> list[Reply | None]:
        self.asked.extend((request.id, list(request.turns)) for request in requests)
        said = [(request.id, self.script(request.id)) for request in requests]
        return [None if text is None else Reply(name, text, 1, "stop") for name, text in said]


class Longest:
    """Scores a dialogue by the length of its last turn, counted from 10 as the best."""

    def score(self, dialogues: Sequence[Sequence[Turn]]) -> np.ndarray:
        return np.array([-abs(10 - len(dialogue[-1]["text"])) for dialogue in dialogues], np.float32)


_PROMPTED = {"model": "m", "demonstrations": "d", "shots": 1}
CONFIG = DemonstrationsConfig.model_validate(
    {"assistant": _PROMPTED, "user": _PROMPTED, "max_turns": 2, "farewells": ["bye", "See you"]}
)
QUERIES = [{"id": f"q{i}", "text": f"query {i}"} for i in range(5)]


def played(assistant: Scripted, user: Scripted, n: int, scorer: Any, evaluation: Sequence[str] = ()) -> list[Any]:
    told: list[int] = []
    dialogues = play_chunk(QUERIES, assistant, user, n, CONFIG, scorer, frozenset(evaluation), told.append)
    assert sum(told) == 3 * len(QUERIES), "progress ends at all turns that there might have been, however it went"
    return [demonstrations.demonstration_record(dialogue) for dialogue in dialogues]


def test_11_the_best_candidate_is_kept_in_any_order_with_deterministic_ties() -> None:
    texts = {"0": "0123456789", "1": "x", "2": "abcdefghij", "3": "abc"}
    chosen = []
    for order in itertools.permutations("0123"):
        assistant = Scripted(lambda name, order=order: texts[order[int(name[-1])]] + name[:2])  # type: ignore[misc]
        user = Scripted(lambda name: f"and {name}?")
        records = played(assistant, user, 4, Longest())
        chosen.append([[turn["text"] for turn in record["turns"]] for record in records])
        first = records[3]["turns"][1]
        assert [candidate["text"] for candidate in first["candidates"]] == [texts[key] + "q3" for key in order]
        assert {candidate["score"] for candidate in first["candidates"]} == {-2.0, -7.0, -5.0}
    # "0123456789" and "abcdefghij" tie; the text that sorts first wins, wherever it stood.
    assert all(one == chosen[0] for one in chosen)
    assert chosen[0][3] == ["query 3", "0123456789q3", "and q3/1?", "0123456789q3"]


def test_each_turn_sees_the_turns_that_were_kept() -> None:
    assistant = Scripted(lambda name: {"0": "short", "1": "just right", "2": "this is far too long"}[name[-1]])
    user = Scripted(lambda name: "go on")
    played(assistant, user, 3, Longest())
    assert [turn["text"] for turn in user.asked[0][1]] == ["query 0", "just right"]  # type: ignore[attr-defined]
    second = [turns for name, turns in assistant.asked if name == "q4/1/2"]  # type: ignore[attr-defined]
    assert [turn["text"] for turn in second[0]] == ["query 4", "just right", "go on"]
    names = [name for name, _ in assistant.asked]  # type: ignore[attr-defined]
    assert len(set(names)) == len(names) == 5 * 3 * 2


def test_dialogues_end_at_an_empty_user_turn_and_at_an_evaluation_query() -> None:
    says = {"q0/1": "", "q1/1": "What  is\nHELD out", "q2/1": "what is held", "q3/1": "x", "q4/1": "y"}
    records = played(
        Scripted(lambda name: "fine"), Scripted(lambda name: says[name]), 1, None, ["what is held out"]
    )
    assert [len(record["turns"]) for record in records] == [2, 2, 4, 4, 4]
    assert all(record["turns"][-1]["role"] == "assistant" for record in records)


def test_empty_candidates_are_never_chosen() -> None:
    silent = {"q0": ["", "", ""], "q1": ["", "far too long a text for this", ""]}
    assistant = Scripted(lambda name: silent.get(name[:2], ["a", "b", "c"])[int(name[-1])] if "/0/" in name else "")
    records = played(assistant, Scripted(lambda name: "more"), 3, Longest())
    assert [turn["role"] for turn in records[0]["turns"]] == ["human"]
    assert not demonstrations.is_answered(records[0]) and demonstrations.is_answered(records[1])
    assert records[1]["turns"][1]["text"] == "far too long a text for this"
    # In the second round the assistant is mute: the user's turn goes too, so that the assistant has the last word.
    assert [len(record["turns"]) for record in records] == [1, 2, 2, 2, 2]
    summary = demonstrations.summarize(records)
    assert (summary["dialogues"], summary["unanswered"], summary["assistant_turns"]) == (5, 1, 4)
    # By hand: q1 keeps 28 letters (-18) beside two silences (-10 each), the others one letter of three (-9 each).
    assert summary["mean_score_kept"] == pytest.approx((-18 - 3 * 9) / 4)
    assert summary["mean_score_candidates"] == pytest.approx((-18 - 2 * 10 - 9 * 9) / 12)


def test_a_dialogue_that_outgrows_the_positions_ends_with_its_last_answer() -> None:
    # q0's query leaves no room for an answer, q1's dialogue none for a user's turn, q2's none for a second answer.
    assistant = Scripted(lambda name: None if name.startswith(("q0/0", "q2/1")) else f"to {name}")
    user = Scripted(lambda name: None if name == "q1/1" else "more")
    records = played(assistant, user, 2, Longest())
    assert [len(record["turns"]) for record in records] == [1, 2, 2, 4, 4]
    assert [record.get("outgrown") for record in records] == [True, True, True, None, None]
    assert [demonstrations.is_answered(record) for record in records] == [False, True, True, True, True]
    assert len(records[3]["turns"][3]["candidates"]) == 2
    summary = demonstrations.summarize(records)
    assert (summary["outgrown"], summary["unanswered"], summary["assistant_turns"]) == (3, 1, 6)


def test_plain_self_play_keeps_its_one_candidate_unscored() -> None:
    records = played(Scripted(lambda name: f"reply {name}"), Scripted(lambda name: ""), 1, None)
    assert records[2]["turns"][1] == {
        "role": "assistant",
        "text": "reply q2/0/0",
        "candidates": [{"text": "reply q2/0/0", "score": None}],
    }
    assert demonstrations.summarize(records)["mean_score_kept"] is None


FILES = ("demonstrations.jsonl", "demonstrations_self_play.jsonl")


@pytest.fixture
def with_reward_model(make_run: Callable[..., Run]) -> Callable[[Path], Run]:
    def build(folder: Path) -> Run:
        run = make_run(folder)
        if not run.path("reward", "model").exists():
            reward.run_stage(run)
        for file in FILES:
            run.path(file).unlink()
        return run

    return build


def test_28_self_play_stopped_and_resumed_is_the_same_to_the_byte(
    with_reward_model: Callable[[Path], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = with_reward_model(tmp_path / "whole")
    queries = read_records(whole.path("queries.jsonl"))
    write_records(whole.path("evaluation_queries.jsonl"), [{"id": "e", "text": queries[1]["text"].upper()}])
    summary = demonstrations.run_stage(whole)
    records = [read_records(whole.path(file)) for file in FILES]
    # 10 queries without the one that is also an evaluation query, in the order of the file.
    expected = [query["id"] for query in queries if query["id"] != "q1"][:10]
    assert all([record["query_id"] for record in each] == expected for each in records)
    assert summary["guided"]["mean_score_kept"] > summary["guided"]["mean_score_candidates"]
    for each, n in zip(records, (3, 1), strict=True):
        turns = [turn for record in each for turn in record["turns"] if turn["role"] == "assistant"]
        assert {len(turn["candidates"]) for turn in turns} == {n}
        assert any(len(record["turns"]) == 4 for record in each)
    # Plain self-play has randomness of its own: it isn't the guided one's first candidates.
    first = [
        [record["turns"][1]["candidates"][0]["text"] for record in each if demonstrations.is_answered(record)]
        for each in records
    ]
    assert first[0] != first[1]

    # Stop in the middle of writing the second chunk (6 dialogues each), then again in the middle of plain self-play.
    write = demonstrations.RecordWriter.write
    stopped = with_reward_model(tmp_path / "stopped")
    write_records(stopped.path("evaluation_queries.jsonl"), read_records(whole.path("evaluation_queries.jsonl")))
    for stop in (8, 5):
        written: list[str] = []

        def stopping(writer: Any, record: Any, written: list[str] = written, stop: int = stop) -> None:
            if len(written) == stop:
                raise Stopped
            written.append(record["query_id"])
            write(writer, record)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(demonstrations.RecordWriter, "write", stopping)
            demonstrations.run_stage(stopped)
    # The first stop left 8 dialogues, after the second guided play was finished: what is done isn't written again.
    assert written == expected[8:] + expected[:3]
    assert demonstrations.run_stage(stopped) == summary
    for file in FILES:
        assert whole.path(file).read_bytes() == stopped.path(file).read_bytes()


def test_guided_scores_are_the_reward_models(with_reward_model: Callable[[Path], Run], tmp_path: Path) -> None:
    run = with_reward_model(tmp_path)
    summary = demonstrations.play(
        run, "guided", 3, reward.RewardScorer(reward.load_reward_model(run, "reward"), 4, print)
    )
    scorer = reward.RewardScorer(reward.load_reward_model(run, "reward"), 7, print)
    for record in read_records(run.path("guided.jsonl")):
        for place, turn in enumerate(record["turns"]):
            if turn["role"] == "assistant":
                before = demonstrations.demonstration_turns({"turns": record["turns"][:place]})
                own: list[list[Turn]] = [
                    [*before, {"role": "assistant", "text": candidate["text"]}] for candidate in turn["candidates"]
                ]
                expected = [candidate["score"] for candidate in turn["candidates"]]
                np.testing.assert_allclose(scorer.score(own), expected, atol=1e-4)
                speaking = [candidate for candidate in turn["candidates"] if candidate["text"]]
                best = max(candidate["score"] for candidate in speaking)
                assert turn["text"] in [candidate["text"] for candidate in speaking if candidate["score"] == best]
    assert summary["dialogues"] == 10


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("Bye!", True),
        ("Thanks, that helps. Bye", True),
        ("see\u00a0 you.", True),
        ("Bye for now, and thanks", True),
        ("Write a card that says bye to a colleague", False),
        ("Did you see your answer?", False),
        ("Goodbye", False),  # not in the list
        ("", False),
    ],
)
def test_a_farewell_begins_or_ends_a_turn(text: str, over: bool) -> None:
    assert says_farewell(text, CONFIG.farewells) is over


def test_a_user_who_says_farewell_ends_the_dialogue_with_the_assistants_word() -> None:
    user = Scripted(lambda name: "Thanks, bye!" if name.startswith("q2") else "and then?")
    records = played(Scripted(lambda name: f"to {name}"), user, 1, None)
    assert [len(record["turns"]) for record in records] == [4, 4, 2, 4, 4]
    assert records[2]["turns"][-1]["role"] == "assistant"
    assert "bye" not in str(records)


def test_a_speakers_model_is_loaded_when_it_speaks(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = run.config.demonstrations
    user = config.user.model_copy(update={"model": "small"})
    speakers = [
        demonstrations._speaker(run, prompted, config.sampling, "x", False) for prompted in (config.assistant, user)
    ]
    assert run._loaded == {}
    for speaker, name in zip(speakers, ("large", "small"), strict=True):
        speaker.load()
        # Never both: the one that spoke before is gone.
        assert list(run._loaded) == [name]


def test_a_dialogue_that_goes_on_from_its_cache_is_the_one_that_is_read_again(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    written = []
    for reuse in (True, False):
        run = make_run(tmp_path / str(reuse))
        played = run.config.demonstrations.model_copy(update={"reuse_cache": reuse, "max_turns": 3, "queries": 5})
        run = dataclasses.replace(run, config=run.config.model_copy(update={"demonstrations": played}))
        write_records(run.path("queries.jsonl"), QUERIES)
        demonstrations.play(run, "demonstrations_self_play", 2, None)
        written.append(read_records(run.path("demonstrations_self_play.jsonl")))
    assert written[0] == written[1] and any(len(record["turns"]) > 2 for record in written[0])


@pytest.mark.parametrize(("reuse", "sizes"), [(True, [6, 4]), (False, [10])])
def test_more_dialogues_are_played_at_once_where_nothing_is_kept_of_them(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool, sizes: list[int]
) -> None:
    run = make_run(tmp_path)
    played = run.config.demonstrations.model_copy(update={"reuse_cache": reuse})
    assert max(played.sampling.batch_size, played.user_sampling.batch_size) == 6
    run = dataclasses.replace(run, config=run.config.model_copy(update={"demonstrations": played}))
    found = []

    def remembering(queries: Sequence[Any], *more: Any) -> Any:
        found.append(len(queries))
        return play_chunk(queries, *more)

    monkeypatch.setattr(demonstrations, "play_chunk", remembering)
    demonstrations.play(run, "demonstrations_self_play", 1, None)
    assert found == sizes


@pytest.mark.parametrize("lasting", [True, False])
def test_queries_too_long_for_the_model_do_not_stop_the_others(
    make_run: Callable[..., Run], tmp_path: Path, lasting: bool
) -> None:
    run = make_run(tmp_path / "run")
    # The 128 positions hold the few-shot prompt, a query and an answer of 9 tokens.
    long, longer = "what is " + "red " * 91, "what is " + "red " * 120
    write_records(run.path("queries.jsonl"), [*QUERIES, {"id": "l2", "text": long}, {"id": "ll", "text": longer}])
    if not lasting:
        user = run.config.demonstrations.user.model_copy(update={"model": "small"})
        played = run.config.demonstrations.model_copy(update={"user": user})
        run = dataclasses.replace(run, config=run.config.model_copy(update={"demonstrations": played}))
    summary = demonstrations.play(run, "guided", 2, None)
    records = {record["query_id"]: record for record in read_records(run.path("guided.jsonl"))}
    assert len(records) == summary["dialogues"] == 7 and summary["outgrown"] == 2
    assert [turn["role"] for turn in records["ll"]["turns"]] == ["human"]
    assert [turn["role"] for turn in records["l2"]["turns"]] == ["human", "assistant"]
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 7 dialogues ended early" in said
    assert "guided: 7 dialogues instead of the 10 of demonstrations.queries" in said

    # The others' records are those of a run without the long ones.
    alone = make_run(tmp_path / "alone")
    alone = dataclasses.replace(alone, config=run.config)
    write_records(alone.path("queries.jsonl"), QUERIES)
    demonstrations.play(alone, "guided", 2, None)
    assert read_records(alone.path("guided.jsonl")) == [records[query["id"]] for query in QUERIES]

    write_records(run.path("queries.jsonl"), [{"id": "ll", "text": longer}])
    with pytest.raises(InputError, match=r"no query leaves room for an answer, not even 'what is red .*128 positions"):
        demonstrations.play(run, "none", 2, None)
