from collections.abc import Callable
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages.queries import from_file, from_microworld, query_id, run_stage


def test_ids_come_from_the_text_alone():
    assert query_id("why?") == query_id("why?") != query_id("why ?")
    assert len(query_id("why?")) == 16


def test_queries_of_a_file_are_distinct_and_keep_their_origin(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    write_records(path, [{"text": " a? "}, {"text": "b?", "id": 7}, {"text": "a?"}, {"text": "c?"}])
    found, duplicates = from_file(str(path), 2)
    assert duplicates == 1
    assert found == [
        {"id": query_id("a?"), "text": "a?", "source": "file", "origin": "asked.jsonl: record 1"},
        {"id": query_id("b?"), "text": "b?", "source": "file", "origin": "asked.jsonl: 7"},
    ]


@pytest.mark.parametrize("record", [{"question": "a?"}, {"text": ""}, {"text": 3}])
def test_a_record_without_text_is_refused_by_number(tmp_path: Path, record: dict[str, object]):
    path = tmp_path / "asked.jsonl"
    write_records(path, [{"text": "a?"}, record])
    with pytest.raises(InputError, match="record 2 has no `text`"):
        from_file(str(path), 5)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_queries_is_refused_at_once(tmp_path: Path, content: str):
    path = tmp_path / "asked.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"queries.file: .*asked.jsonl holds no query"):
        from_file(str(path), 5)


def test_a_file_is_needed_when_the_source_is_one(tmp_path: Path):
    with pytest.raises(InputError, match="queries.file"):
        from_file(None, 5)
    with pytest.raises(InputError, match="absent.jsonl"):
        from_file(str(tmp_path / "absent.jsonl"), 5)


def test_microworld_queries_depend_on_the_seed_alone():
    first = from_microworld(3, 40)
    assert first == from_microworld(3, 40) != from_microworld(4, 40)
    assert len({query["id"] for query in first}) == 40


def test_more_queries_than_the_microworld_has_is_an_input_error():
    with pytest.raises(InputError, match="queries"):
        from_microworld(3, 8000)


def test_a_short_file_is_said_aloud(make_run: Callable[..., Run], tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    write_records(path, [{"text": "a?"}, {"text": "b?"}])
    run = make_run(tmp_path / "run", queries={"source": "file", "file": str(path), "count": 9})
    assert run_stage(run) == {"source": "file", "duplicates": 0, "queries": 2}
    assert [record["text"] for record in read_records(run.path("queries.jsonl"))] == ["a?", "b?"]
    assert "2 instead of the 9" in run.console.file.getvalue()  # type: ignore[attr-defined]
