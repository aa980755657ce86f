import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from almost_jax.config import SelfInstructConfig
from almost_jax.errors import InputError
from almost_jax.inputs import all_values
from almost_jax.io.records import partial_path, read_records
from almost_jax.io.run import Run
from almost_jax.stages import queries, self_instruct
from almost_jax.stages.instructions import Candidate, list_prompt, load_instructions, parse_list, reject
from almost_jax.stages.self_instruct import Pool
from almost_jax.stages.similarity import SimilarityPool, longest_common_subsequence, rouge_l, rouge_tokens

CONFIG = SelfInstructConfig(min_words=3, max_words=9, in_context=3, in_context_generated=1)
SCORER = RougeScorer(["rougeL"], use_stemmer=False)


def official(first: str, second: str) -> float:
    return SCORER.score(first, second)["rougeL"].fmeasure


def random_text(rng: random.Random) -> str:
    words = [
        "Write",
        "a",
        "a",
        "poem",
        "the",
        "don't",
        "3.5",
        "x_y",
        "caf\u00e9",
        "OK!",
        "--",
        "new\nline",
        "\u0130stanbul",
        "a",
    ]
    return " ".join(rng.choice(words) for _ in range(rng.randrange(14)))


def test_rouge_l_equals_the_rouge_score_package():
    rng = random.Random(5)
    for _ in range(400):
        first, second = random_text(rng), random_text(rng)
        assert rouge_l(rouge_tokens(first), rouge_tokens(second)) == official(first, second), (first, second)


def test_longest_common_subsequence_by_hand():
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4
    assert longest_common_subsequence("", "abc") == longest_common_subsequence("abc", "") == 0
    assert longest_common_subsequence("ab" * 70, "ba" * 70) == 139


def test_the_pool_finds_what_comparing_with_everything_finds():
    rng = random.Random(9)
    pool, texts = SimilarityPool(), [random_text(rng) for _ in range(60)]
    for text in texts:
        pool.add(text)
    found = 0
    for threshold in (0.0, 0.4, 0.7, 2 / 3, 1.0):
        for _ in range(12):
            text = random_text(rng)
            scores = [official(old, text) for old in texts]
            best = max(scores)
            expected = (scores.index(best), best) if best > threshold else None
            assert pool.most_similar(text, threshold) == expected
            found += expected is not None
    assert 15 < found < 60
    assert SimilarityPool().most_similar("anything", 0.0) is None


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" Write a poem.\n5. Explain tides.\n6. Name a fish.", ["Write a poem.", "Explain tides.", "Name a fish."]),
        (
            "\nWrite a poem.\n\n5) Explain tides.\n\n(6) Name a fish.",
            ["Write a poem.", "Explain tides.", "Name a fish."],
        ),
        (
            " Write a poem.\n 5 . Explain tides.\nTask 6: Name a fish.",
            ["Write a poem.", "Explain tides.", "Name a fish."],
        ),
        (' "Write a poem."\n5. **Explain tides.**', ["Write a poem.", "Explain tides."]),
        (' Say "yes" or "no"\n5. "a" is not "b"', ['Say "yes" or "no"', '"a" is not "b"']),
        # A request over several lines; an answer after it is dropped.
        (" Translate:\n  Good   morning\n5. Explain tides.", ["Translate: Good morning", "Explain tides."]),
        (" Add 2 and 3.\nAnswer: 5\nEasy.\n5. Explain tides.", ["Add 2 and 3.", "Explain tides."]),
        # Numbers in one line count on after the end of a sentence only.
        (" Write a poem. 5. Explain tides. 6. Name a fish.", ["Write a poem.", "Explain tides.", "Name a fish."]),
        (" Summarize chapter 5. of a book\n5. Explain tides.", ["Summarize chapter 5. of a book", "Explain tides."]),
        # Slips in counting go on; a new list, a jump and prose after a blank line end the list.
        (" Write a poem.\n4. Explain tides.\n6. Name a fish.", ["Write a poem.", "Explain tides.", "Name a fish."]),
        (" Write a poem.\n5. Explain tides.\n1. First, the moon", ["Write a poem.", "Explain tides."]),
        (" Write a poem.\n50. Explain tides.", ["Write a poem."]),
        (" Write a poem.\n\nThe assistant is kind.\n5. Explain tides.", ["Write a poem."]),
        # Empty items are kept, to be counted.
        (" Write a poem.\n5.\n6. Name a fish.", ["Write a poem.", "", "Name a fish."]),
        ("", [""]),
    ],
)
def test_numbered_lists_are_read_as_vanilla_models_write_them(completion: str, expected: list[str]):
    assert parse_list(completion, 4, finished=True) == [Candidate(text, complete=True) for text in expected]


def test_only_what_the_budget_cut_off_is_incomplete():
    text = " Write a poem.\n5. Explain ti"
    assert [candidate.complete for candidate in parse_list(text, 4, finished=False)] == [True, False]
    assert [candidate.complete for candidate in parse_list(text, 4, finished=True)] == [True, True]
    # What comes after the list's end is cut off, not the list's last request.
    ended = parse_list(" Write a poem.\n\nAnd so o", 4, finished=False)
    assert ended == [Candidate("Write a poem.", complete=True)]


def test_the_prompt_ends_with_the_next_number():
    assert list_prompt(["One?", "Two?"]) == "1. One?\n2. Two?\n3."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Write a poem about rain.", None),
        ("What is the capital of Peru?", None),
        ("\u00bfQu\u00e9 hora es en Lima?", None),
        ("Translate the following into French: Good morning", None),
        ('Correct the following: "me go home"', None),
        ("", "malformed"),
        ("- - - -", "malformed"),
        (": what is this", "malformed"),
        ("____ is a color", "malformed"),
        ("Explain tides.", "too_short"),
        ("Write a poem about rain and snow and wind and sun.", "too_long"),
        ("The sky is blue today.", "no_request"),
        ("I am a good cook. I like bread.", "no_request"),
        ("Yes, it is true.", "no_request"),
        ("how do tides work", None),
        ("My dog is ill. Suggest a cure.", None),
        ("You need to sort these: b, a", None),
        ("Describe what is in this image.", "not_text"),
        ("Summarize https://example.org/a for me", "not_text"),
        ("Make a pie chart of sales.", "not_text"),
        ("Explain what the video shows.", "not_text"),
        ("Summarize the following article.", "missing_input"),
        ("Correct the grammar of this:", "missing_input"),
        ("Go on with the story...", "missing_input"),
    ],
)
def test_requests_are_rejected_by_name(text: str, reason: str | None):
    assert reject(Candidate(text, complete=True), CONFIG) == reason
    assert reject(Candidate(text, complete=False), CONFIG) == "unfinished"


def test_the_pool_takes_each_request_once():
    pool = Pool(["What is the capital of Peru?", "Explain how tides work."], CONFIG, queries.query_id)

    def consider(text: str) -> tuple[str | None, float | None]:
        return pool.consider(Candidate(text, complete=True), "round 0, request 0")

    assert consider("Write a poem about rain.") == (None, None)
    assert consider("Write a poem about rain.") == ("duplicate", None)
    # 4 of 5 words in order: 0.8 > 0.7.
    assert consider("Write a poem about snow.") == ("near_duplicate", pytest.approx(0.8))
    assert consider("what's the capital of Peru?")[0] == "near_duplicate"
    assert consider("Name three fish.") == (None, None)
    assert [query["source"] for query in pool.queries] == ["seed", "seed", "generated", "generated"]
    assert len({query["id"] for query in pool.queries}) == 4
    shown = pool.examples(random.Random(1))
    assert len(shown) == 3 and sum(text in pool.generated for text in shown) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instructions: []", "must be a list of texts"),
        ("instructions: [a, 3]", "instruction 2 must be a text, not 3"),
        ("instructions: [a  b, 'a b']", "stands there 2 times"),
    ],
)
def test_malformed_seeds_are_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "seeds.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_instructions(str(path))


@pytest.fixture
def self_instruct_run(make_run: Callable[..., Run], tmp_path: Path) -> Callable[[str], Run]:
    """Runs whose queries come from a tiny random model: most of what it writes is rejected, some is not."""
    seeds = tmp_path / "seeds.yaml"
    seeds.write_text("instructions: [what is the red river, one of two three please, is a bird blue]")

    def build(name: str, **changes: object) -> Run:
        settings = {
            "seeds": str(seeds),
            "generator": "small",
            "in_context": 3,
            "in_context_generated": 1,
            "max_similarity": 0.8,
            "min_words": 3,
            "max_rounds": 4,
            "requests_per_round": 6,
            "sampling": {"max_new_tokens": 12, "batch_size": 4},
            **changes,
        }
        return make_run(tmp_path / name, queries={"source": "self_instruct", "count": 23, "self_instruct": settings})

    return build


def test_28_self_instruct_resumes_to_the_same_bytes(self_instruct_run: Callable[..., Run]):
    whole = self_instruct_run("whole")
    summary = queries.run_stage(whole)
    rounds = whole.path("self_instruct", "rounds.jsonl").read_bytes()
    lines = rounds.splitlines(keepends=True)
    assert len(lines) >= 3 and summary["queries"] > summary["seeds"], "a kill must have something to lose"
    for size in (7, len(lines[0]), len(lines[0] + lines[1]) + 20, len(rounds)):
        killed = self_instruct_run(f"killed{size}")
        path = killed.path("self_instruct", "rounds.jsonl")
        path.parent.mkdir()
        partial_path(path).write_bytes(rounds[:size])
        assert queries.run_stage(killed) == summary
        assert path.read_bytes() == rounds
        assert killed.path("queries.jsonl").read_bytes() == whole.path("queries.jsonl").read_bytes()


def test_28_what_is_finished_is_not_generated_again(
    self_instruct_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    run = self_instruct_run("run")
    summary = queries.run_stage(run)
    before = run.path("self_instruct", "rounds.jsonl").read_bytes()
    monkeypatch.setattr(self_instruct, "generate", None)
    assert queries.run_stage(run) == summary and run.path("self_instruct", "rounds.jsonl").read_bytes() == before


def test_every_candidate_is_accounted_for(self_instruct_run: Callable[..., Run]):
    run = self_instruct_run("run")
    summary = queries.run_stage(run)
    records = read_records(run.path("queries.jsonl"))
    candidates = [
        candidate
        for record in read_records(run.path("self_instruct", "rounds.jsonl"))
        for candidate in record["candidates"]
    ]
    accepted = [candidate["text"] for candidate in candidates if candidate["rejected"] is None]
    seeds = load_instructions(run.config.queries.self_instruct.seeds)
    assert [record["text"] for record in records] == [*seeds, *accepted]
    assert summary["candidates"] == len(candidates) == len(accepted) + sum(summary["rejected"].values())
    assert summary["rejected"]["unfinished"] > 0 and len(accepted) > 0
    assert summary["queries"] == len(records) and summary["seeds"] == 3


def test_self_instruct_refuses_another_runs_rounds(self_instruct_run: Callable[..., Run]):
    whole = self_instruct_run("whole", max_rounds=1)
    queries.run_stage(whole)
    rounds = whole.path("self_instruct", "rounds.jsonl").read_bytes()
    # Its rounds are no groups of batches.
    grouped = {"max_rounds": 1, "sampling": {"max_new_tokens": 12, "batch_size": 4, "group_batches": 9}}
    alike = self_instruct_run("grouped", **grouped).config
    assert all_values(alike) == all_values(whole.config)
    for name, changes, refused in (
        ("other", {"max_similarity": 0.7}, True),
        ("more", {"max_rounds": 2}, False),
        ("grouped", {**grouped, "max_rounds": 2}, False),
    ):
        run = self_instruct_run(name, **changes)
        path = run.path("self_instruct", "rounds.jsonl")
        path.parent.mkdir()
        partial_path(path).write_bytes(rounds)
        if refused:
            with pytest.raises(InputError, match="other settings"):
                queries.run_stage(run)
        else:
            queries.run_stage(run)
            assert path.read_bytes().startswith(rounds)
            assert json.loads(path.read_bytes().splitlines()[-1])["round"] == 1


def test_too_few_seeds_for_a_prompt_are_refused(self_instruct_run: Callable[..., Run]):
    with pytest.raises(InputError, match="in_context"):
        queries.run_stage(self_instruct_run("run", in_context=4))
