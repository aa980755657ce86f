import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from almost_jax.config import ComparisonsConfig
from almost_jax.core.heads import add_head
from almost_jax.errors import InputError
from almost_jax.io.models import load_model, save_model
from almost_jax.io.records import partial_path, read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages import comparisons
from almost_jax.stages.comparisons import (
    Ranking,
    Responses,
    make_pairs,
    rankings,
    rule_of_thumb,
    run_responses,
    run_stage,
)
from almost_jax.stages.filters import filter_pair
from almost_jax.stages.reward import RewardScorer, load_reward_model

# The paper's configurations (ALMoST, table of section 2.1).
PAPER = {
    "A": {"model": "30b", "demonstrations": "faithful", "shots": 3},
    "B": {"model": "30b", "demonstrations": "hhh", "shots": 5},
    "C": {"model": "13b", "demonstrations": "hhh", "shots": 3},
    "D": {"model": "7b", "demonstrations": "hhh", "shots": 3},
    "E": {"model": "7b", "demonstrations": "hhh", "shots": 1},
}
SIZE, DEMONSTRATIONS, SHOTS = "size", "demonstrations", "shots"


def thumb(configurations: dict[str, Any] = PAPER, **changes: Any) -> ComparisonsConfig:
    orders = {"model_order": ["30b", "13b", "7b"], "demonstrations_order": ["faithful", "hhh"]}
    # Not validated: these tests are about what the stage makes of the orders.
    whole = ComparisonsConfig.model_validate({"configurations": PAPER, **orders})
    prompted = type(whole.configurations["A"])
    made = {name: prompted.model_validate(entry) for name, entry in configurations.items()}
    return whole.model_copy(update={"configurations": made, **changes})


def test_the_rule_of_thumb_ranks_the_papers_configurations():
    expected = [
        Ranking("A", "B", DEMONSTRATIONS),
        Ranking("A", "C", SIZE),
        Ranking("A", "D", SIZE),
        Ranking("A", "E", SIZE),
        Ranking("B", "C", SIZE),
        Ranking("B", "D", SIZE),
        Ranking("B", "E", SIZE),
        Ranking("C", "D", SIZE),
        Ranking("C", "E", SIZE),
        Ranking("D", "E", SHOTS),
    ]
    assert rankings(thumb()) == expected
    assert rankings(thumb(pairs="adjacent")) == [
        Ranking("A", "B", DEMONSTRATIONS),
        Ranking("B", "C", SIZE),
        Ranking("C", "D", SIZE),
        Ranking("D", "E", SHOTS),
    ]


def test_the_rule_of_thumb_does_not_depend_on_who_comes_first():
    for first in PAPER:
        for second in PAPER:
            if first != second:
                assert rule_of_thumb(first, second, thumb()) == rule_of_thumb(second, first, thumb())


@pytest.mark.parametrize(
    ("configurations", "changes", "message"),
    [
        ({"A": PAPER["A"], "X": PAPER["A"]}, {}, "A and X are the same"),
        ({"B": PAPER["B"], "A": PAPER["A"]}, {}, "A comes after B, but is better by demonstrations"),
        ({"E": PAPER["E"], "D": PAPER["D"]}, {}, "D comes after E, but is better by shots"),
        ({"A": PAPER["A"]}, {}, "at least two"),
        (PAPER, {"model_order": ("30b", "7b")}, "model_order.*'13b'.*configuration C"),
        (PAPER, {"demonstrations_order": ("hhh",)}, "demonstrations_order.*'faithful'.*configuration A"),
    ],
)
def test_configurations_that_contradict_the_rule_are_refused(
    configurations: dict[str, Any], changes: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        rankings(thumb(configurations, **changes))


def test_pairs_hold_the_texts_the_rule_and_the_margin():
    texts = {"A": "one", "B": "two", "C": ""}
    ranked = [Ranking("A", "B", DEMONSTRATIONS), Ranking("A", "C", SIZE)]
    assert make_pairs("q", texts, {"one": 0.25, "two": 1.0}, ranked) == [
        {
            "query_id": "q",
            "chosen": {"configuration": "A", "text": "one"},
            "rejected": {"configuration": "B", "text": "two"},
            "rule": "demonstrations",
            "as_is_margin": -0.75,
        },
        {
            "query_id": "q",
            "chosen": {"configuration": "A", "text": "one"},
            "rejected": {"configuration": "C", "text": ""},
            "rule": "size",
            "as_is_margin": None,
        },
    ]


@pytest.fixture
def comparing_run(make_run: Callable[..., Run], user_demonstrations: str, tmp_path: Path) -> Callable[..., Run]:
    """Runs with three configurations on two models, the two of one model not next to each other in the file."""

    def build(name: str, **sections: Any) -> Run:
        def prompted(model: str, shots: int) -> dict[str, Any]:
            return {"model": model, "demonstrations": user_demonstrations, "shots": shots}

        section = {
            "configurations": {"A": prompted("large", 2), "B": prompted("large", 1), "C": prompted("small", 2)},
            "model_order": ["large", "small"],
            "demonstrations_order": [user_demonstrations],
            "sampling": {"temperature": 0.9, "max_new_tokens": 7, "batch_size": 5},
        }
        return make_run(tmp_path / name, comparisons=section, **sections)

    return build


def with_reward_model(run: Run) -> Run:
    """Put a random as-is reward model into a run."""
    policy = load_model(run.config.models["small"], run.mesh, "float32")
    params = add_head(policy.params, policy.config, jax.random.key(5), stddev=0.7)
    fields = {"kind": "reward", "reward_mean": 0.3, "reward_std": 1.7}
    save_model(run.path("as_is_reward", "model"), type(policy)(**{**vars(policy), "params": params, **fields}))
    return run


def test_28_responses_resume_to_the_same_bytes(comparing_run: Callable[..., Run]):
    whole = comparing_run("whole")
    summary = run_responses(whole)
    written = whole.path("responses.jsonl").read_bytes()
    lines = written.splitlines(keepends=True)
    assert len(lines) == 3 * 24 and not partial_path(whole.path("responses.jsonl")).exists()

    # Torn in a line, within a batch, at a batch's end, between configurations, between models, before the rename.
    for size in (11, *(len(b"".join(lines[:count])) for count in (3, 10, 24, 48)), len(written)):
        killed = comparing_run(f"killed{size}")
        partial_path(killed.path("responses.jsonl")).write_bytes(written[:size])
        assert run_responses(killed) == summary
        assert killed.path("responses.jsonl").read_bytes() == written


def test_responses_say_where_they_come_from(comparing_run: Callable[..., Run]):
    run = comparing_run("run")
    summary = run_responses(run)
    records = read_records(run.path("responses.jsonl"))
    queries = [record["id"] for record in read_records(run.path("queries.jsonl"))]
    assert [record["query_id"] for record in records] == queries * 3
    assert list(dict.fromkeys(record["configuration"] for record in records)) == ["A", "B", "C"]
    assert {(r["configuration"], r["model"], r["shots"]) for r in records} == {
        ("A", "large", 2),
        ("B", "large", 1),
        ("C", "small", 2),
    }
    # Each configuration draws on its own.
    assert len({record["seed"] for record in records}) == 3
    assert {record["finish"] for record in records} == {"stop", "length"}
    # A random model also draws special tokens, which count and are not seen.
    assert all(len(record["text"].split()) <= record["tokens"] <= 7 for record in records)
    assert any(len(record["text"].split()) == record["tokens"] > 1 for record in records)
    assert not any(label in record["text"] for record in records for label in ("Human:", "Assistant:"))
    assert summary["responses"] == 72
    assert summary["B"]["unfinished"] == sum(r["finish"] == "length" for r in records if r["configuration"] == "B")


def test_responses_of_other_queries_are_refused(comparing_run: Callable[..., Run]):
    run = comparing_run("run")
    path = partial_path(run.path("responses.jsonl"))
    path.write_bytes(b'{"query_id": "q1", "configuration": "A"}\n')
    with pytest.raises(InputError, match="other queries or configurations"):
        run_responses(run)


@pytest.fixture
def compared(comparing_run: Callable[..., Run]) -> tuple[Run, dict[str, Any]]:
    """A run through both stages, one response emptied by hand and two made the same."""
    run = with_reward_model(comparing_run("compared"))
    run_responses(run)
    records = read_records(run.path("responses.jsonl"))
    records[0] = {**records[0], "text": ""}
    records[25] = {**records[25], "text": "a red bird"}
    records[49] = {**records[49], "text": "a red bird"}
    write_records(run.path("responses.jsonl"), records)
    return run, run_stage(run)


def test_comparisons_are_pairs_of_responses_with_margins_of_the_as_is_model(compared: tuple[Run, dict[str, Any]]):
    run, summary = compared
    texts: dict[str, dict[str, str]] = {}
    for record in read_records(run.path("responses.jsonl")):
        texts.setdefault(record["query_id"], {})[record["configuration"]] = record["text"]
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    records = read_records(run.path("comparisons.jsonl"))
    scorer = RewardScorer(load_reward_model(run, "as_is_reward"), 3, print)
    assert len(records) == summary["pairs"] == 3 * 24

    def score(query: str, text: str) -> float:
        dialogue = [{"role": "human", "text": queries[query]}, {"role": "assistant", "text": text}]
        return float(scorer.score([dialogue])[0])  # type: ignore[list-item]

    for record in records:
        query, chosen, rejected = record["query_id"], record["chosen"], record["rejected"]
        for side in (chosen, rejected):
            assert side["text"] == texts[query][side["configuration"]]
        if chosen["text"] and rejected["text"]:
            # Also where an earlier filter has dropped the pair.
            difference = score(query, chosen["text"]) - score(query, rejected["text"])
            assert record["as_is_margin"] == pytest.approx(difference, abs=1e-5)
        else:
            assert (record["as_is_margin"], record["dropped_by"]) == (None, "empty")
        assert record == filter_pair(record, list(texts[query].values()), run.config.filters)
    reasons = {record["dropped_by"] for record in records}
    assert {None, "empty", "identical", "length", "as_is_reward"} <= reasons
    assert summary["kept"] == sum(record["kept"] for record in records) == sum(summary["kept_by_rule"].values())


def test_other_filters_need_no_new_responses(compared: tuple[Run, dict[str, Any]]):
    run, _ = compared
    before = read_records(run.path("comparisons.jsonl"))
    filters = {"keywords_anywhere": ["bird"], "keywords_start": [], "length_rule": False}
    sections = {**run.config.model_dump(), "filters": filters}
    changed = type(run)(run.directory, type(run.config).model_validate(sections), run.mesh, False, run.console)
    run_stage(changed)
    after = read_records(run.path("comparisons.jsonl"))
    assert [record["as_is_margin"] for record in after] == [record["as_is_margin"] for record in before]
    # The length rule is off, so the texts of the query don't matter.
    assert after == [filter_pair(record, [], changed.config.filters) for record in before]
    assert {"keyword"} <= {record["dropped_by"] for record in after} and after != before


def test_without_the_as_is_filter_nothing_is_scored(comparing_run: Callable[..., Run]):
    run = comparing_run("run", filters={"as_is": False})
    run_responses(run)
    summary = run_stage(run)
    assert all(record["as_is_margin"] is None for record in read_records(run.path("comparisons.jsonl")))
    assert summary["as_is_agreement"] is None and summary["as_is_reward"] == 0 and summary["kept"] > 0


def test_28_comparisons_resume_to_the_same_bytes(compared: tuple[Run, dict[str, Any]]):
    run, summary = compared
    path = run.path("comparisons.jsonl")
    written = path.read_bytes()
    lines = written.splitlines(keepends=True)
    # 8 queries are scored together, that is 24 pairs.
    for size in (13, *(len(b"".join(lines[:count])) for count in (2, 24, 40)), len(written)):
        path.unlink()
        partial_path(path).write_bytes(written[:size])
        assert run_stage(run) == summary
        assert path.read_bytes() == written


def test_what_is_finished_is_neither_sampled_nor_scored_again(
    compared: tuple[Run, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    run, summary = compared
    files = [run.path(name) for name in ("responses.jsonl", "comparisons.jsonl")]
    written = [path.read_bytes() for path in files]

    def refused(*_: Any) -> None:
        raise AssertionError("the file is finished")

    with monkeypatch.context() as patch:
        patch.setattr(comparisons, "respond_as", refused)
        patch.setattr(comparisons, "_compare", refused)
        assert run_responses(run)["responses"] == 72
        assert run_stage(run) == summary
    assert [path.read_bytes() for path in files] == written
    # A query more, and nothing is finished.
    queries = read_records(run.path("queries.jsonl"))
    write_records(run.path("queries.jsonl"), [*queries, {"id": "q24", "text": "what is"}])
    assert run_responses(run)["responses"] == 75
    assert run_stage(run)["pairs"] == 75
    # As is a file of pairs that were scored where the filter by it is off, or the other way round.
    sections = {**run.config.model_dump(), "filters": {"as_is": False}}
    changed = type(run)(run.directory, type(run.config).model_validate(sections), run.mesh, False, run.console)
    assert run_stage(changed)["as_is_agreement"] is None
    assert run_stage(run)["as_is_agreement"] is not None


def test_missing_responses_are_refused(compared: tuple[Run, dict[str, Any]]):
    run, _ = compared
    path = run.path("responses.jsonl")
    write_records(path, read_records(path)[:-1])
    with pytest.raises(InputError, match="responses.jsonl: lacks configuration C's response to query q23"):
        run_stage(run)


def test_responses_are_read_query_by_query_in_little_memory(tmp_path: Path):
    path = tmp_path / "responses.jsonl"
    queries = [{"id": f"q{number}"} for number in range(300)]

    def text(name: str, number: int) -> str:
        return f"{name}{number} " + "long " * 2000

    records = [
        {"query_id": f"q{number}", "configuration": name, "text": text(name, number)}
        for name in ("B", "C", "A")
        for number in range(300)
    ]
    write_records(path, records)
    del records
    tracemalloc.start()
    read = Responses(path, ["A", "B"], queries).by_query()
    for number, texts in enumerate(read):
        assert texts == {"A": text("A", number), "B": text("B", number)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 299
    assert path.stat().st_size > 8_000_000
    assert peak < 800_000


def test_responses_to_other_queries_are_refused(tmp_path: Path):
    path = tmp_path / "responses.jsonl"
    write_records(path, [{"query_id": query, "configuration": "A", "text": "x"} for query in ("q0", "q2")])
    with pytest.raises(InputError, match="configuration A has query q2 where response 2 should be"):
        Responses(path, ["A"], [{"id": "q0"}, {"id": "q1"}])
