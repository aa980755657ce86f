"""Votes of a community: what records of data sets become, and how they are had."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages import as_is_reward
from almost_jax.stages.as_is_reward import load_votes
from almost_jax.stages.comparisons import run_responses, run_stage
from almost_jax.stages.reward import Pair
from almost_jax.stages.votes import hub_votes, pair_of_record, plain_text, votes_are_a_file

DATA = Path(os.environ.get("ALMOST_JAX_DATA", Path(__file__).parents[2] / "shared" / "data"))
HUMAN_PAIRS = DATA / "hh_rlhf_harmless_400.jsonl"


def answer(text: str, score: int) -> dict[str, object]:
    return {"answer_id": 1, "author": "x", "pm_score": score, "selected": False, "text": text}


def test_the_most_voted_answer_is_preferred_to_the_least_voted() -> None:
    answers = [answer("<p>so so</p>", 2), answer("<p>bad</p>", -1), answer("<p>best</p>", 5)]
    found = pair_of_record({"qid": 7, "question": "<p>Why &amp; how?</p>", "answers": answers})
    assert found == {"prompt": "Why & how?", "chosen": "best", "rejected": "bad"}


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "answers": [answer("a", 3), answer("b", 3)]},  # nothing preferred
        {"question": "q", "answers": [answer("a", 3)]},
        {"question": "q", "answers": []},
        {"question": "q", "answers": [answer("a", 3), answer("<p> </p>", 1)]},  # nothing left
        {"question": None, "response_j": "a", "response_k": "b"},
        {"chosen": "a", "rejected": " "},
        {"text": "a"},
    ],
)
def test_records_without_a_preference_are_passed_over(record: dict[str, object]) -> None:
    assert pair_of_record(record) is None


def test_other_fields_are_understood() -> None:
    paired = {"question": "q", "response_j": "<b>good</b>", "response_k": "bad", "qid": 3}
    assert pair_of_record(paired) == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    # Texts that are no markup stay as they are.
    plain = {"chosen": "a < b", "rejected": "x", "prompt": "is <it>?", "score": 2}
    assert pair_of_record(plain) == {"prompt": "is <it>?", "chosen": "a < b", "rejected": "x"}


def test_markup_becomes_text_with_its_paragraphs_lists_and_code() -> None:
    markup = (
        "<p>First &lt;b&gt;\n line,<br>then <em>this</em> <a href='x'>link</a>.</p>\n\n<ul>\n<li>one</li>\n"
        "<li>two</li>\n</ul>\n<pre><code>for x in y:\n    go()\n</code></pre>\n<p>Last.</p>"
    )
    assert plain_text(markup) == (
        "First <b> line,\nthen this link.\n\n- one\n- two\n\nfor x in y:\n    go()\n\nLast."
    )


def write_data_set(folder: Path) -> None:
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for number in range(40):
            answers = [answer(f"good {number}", 4), answer(f"bad {number}", number % 4 + 1)]
            file.write(json.dumps({"qid": number, "question": f"question {number}", "answers": answers}) + "\n")


def test_a_data_set_is_read_through_the_library_and_shuffled_by_the_seed(tmp_path: Path) -> None:
    write_data_set(tmp_path / "stack")
    found = hub_votes(f"hub:{tmp_path / 'stack'}", 7, seed=3)
    assert len(found) == 7
    for pair in found:
        assert pair["chosen"] == pair["prompt"].replace("question", "good")
        assert pair["rejected"] == pair["prompt"].replace("question", "bad")
    assert found == hub_votes(f"hub:{tmp_path / 'stack'}", 7, seed=3)
    assert found != hub_votes(f"hub:{tmp_path / 'stack'}", 7, seed=4)
    # Every fourth question has no preference, which leaves 30.
    assert len(hub_votes(f"hub:{tmp_path / 'stack'}", 99, seed=3)) == 30


def test_a_data_set_that_is_not_there_or_holds_no_pair_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read") as error:
        hub_votes(f"hub:{tmp_path / 'nowhere'}", 7, seed=3)
    assert "\n" not in str(error.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="no record has a pair"):
        hub_votes(f"hub:{tmp_path / 'other'}", 7, seed=3)


def test_what_names_a_file_and_what_does_not() -> None:
    assert votes_are_a_file("votes.jsonl") and votes_are_a_file("/a/hub.jsonl")
    assert not any(votes_are_a_file(votes) for votes in ("microworld", "none", "hub:owner/name"))


@pytest.mark.skipif(not HUMAN_PAIRS.exists(), reason="needs the recorded human preferences")
def test_recorded_human_preferences_are_votes_of_whole_dialogues() -> None:
    pairs = load_votes(HUMAN_PAIRS)
    assert len(pairs) == 400
    for pair in pairs:
        assert pair.chosen.startswith(pair.group) and pair.rejected.startswith(pair.group)
        assert pair.group.startswith("Human:") and "Assistant:" not in pair.group
        shared = len(pair.chosen) - pair.chosen_length
        assert shared == len(pair.rejected) - pair.rejected_length and pair.chosen[:shared].endswith("Assistant:")
        assert pair.chosen[:shared] == pair.rejected[:shared]


def test_pairs_of_one_dialogue_are_one_group_at_any_depth_and_without_labels(tmp_path: Path) -> None:
    first = "Human: what is red\n\nAssistant:"
    deeper = f"{first} a bird\n\nHuman: which\n\nAssistant:"
    texts = [
        (f"{first} a bird", f"{first} a stone"),
        (f"{deeper} this one", f"{deeper} none"),
        ("Q: red?\nA: a bird", "Q: red?\nA: a stone"),
        ("Q: red?\nA: the bird", "Q: red?\nA: a stone"),
        ("Q: red?\nA: a bird\nQ: which\nA: one", "Q: red?\nA: a bird\nQ: which\nA: none"),
        ("Assistant: hi\nHuman: q\nAssistant: a", "Assistant: hi\nHuman: q\nAssistant: b"),
        ("red", "blue"),
    ]
    write_records(tmp_path / "votes.jsonl", [{"chosen": one, "rejected": other} for one, other in texts])
    pairs = load_votes(tmp_path / "votes.jsonl")
    assert [pair.group for pair in pairs] == ["Human: what is red"] * 2 + ["Q: red?"] * 3 + [
        "Assistant: hi", "red",
    ]  # fmt: skip
    assert [pair.chosen_length for pair in pairs] == [7, 9, 17, 19, 33, 2, 3]
    # Space around a prompt makes no other group, and no other text.
    write_records(
        tmp_path / "more.jsonl", [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("q", " q\n")]
    )
    assert len(set(load_votes(tmp_path / "more.jsonl"))) == 1


def test_votes_whose_texts_are_the_same_are_left_out_and_counted(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        as_is_reward, "train_reward_model", lambda run, name, model, pairs, **_: seen.append(len(pairs)) or {}
    )
    path = tmp_path / "votes.jsonl"
    same = {"prompt": "q", "chosen": "a", "rejected": " a"}
    write_records(path, [same, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    run = make_run(tmp_path / "run", as_is_reward={"votes": str(path)})
    as_is_reward.run_stage(run)
    assert seen == [1]
    assert "1 of 2 pairs are left out, whose texts are the same" in run.console.file.getvalue()  # type: ignore[attr-defined]
    write_records(path, [same])
    with pytest.raises(InputError, match="^as_is_reward.votes: both texts are the same in each of 1 pairs"):
        as_is_reward.run_stage(run)


def test_without_votes_there_is_no_model_and_it_says_so(make_run: Callable[..., Run], tmp_path: Path) -> None:
    short = {"sampling": {"max_new_tokens": 6, "batch_size": 8}}
    comparisons = make_run(tmp_path / "run").config.comparisons.model_dump() | short
    run = make_run(
        tmp_path / "run", as_is_reward={"votes": "none"}, filters={"as_is": False}, comparisons=comparisons
    )
    assert as_is_reward.run_stage(run) == {"votes": "none"}
    assert not run.path("as_is_reward").exists()
    # The comparisons do without its scores.
    run_responses(run)
    summary = run_stage(run)
    assert summary["as_is_agreement"] is None and summary["pairs"] == 24
    assert all(record["as_is_margin"] is None for record in read_records(run.path("comparisons.jsonl")))


def test_a_data_set_gives_the_as_is_model_its_pairs(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data_set(tmp_path / "stack")
    given: list[Pair] = []

    def train(run: Run, name: str, model: str, pairs: list[Pair], **_: object) -> dict[str, object]:
        given.extend(pairs)
        return {"pairs": len(pairs)}

    monkeypatch.setattr(as_is_reward, "train_reward_model", train)
    run = make_run(tmp_path / "run", as_is_reward={"votes": f"hub:{tmp_path / 'stack'}", "pairs": 20})
    assert as_is_reward.run_stage(run) == {"pairs": 20}
    for pair in given:
        number = pair.group.removeprefix("question ")
        assert pair.chosen == f"Human: question {number}\n\nAssistant: good {number}"
        assert pair.rejected.endswith(f"bad {number}")
