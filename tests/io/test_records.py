"""Records survive kills, odd texts and foreign files."""

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.io.records import (
    RecordWriter,
    check_writable,
    iter_records,
    partial_path,
    read_records,
    write_bytes,
    write_records,
)

ODD = {
    "id": 'q\u2028\u2029\x85\r\n\t"\\/\x00é漢🙂',
    "": [],
    "numbers": [0.1, 1e-300, 1 / 3, -0.0, 2**70, 1e22, True, None],
    "nested": {"z": 1, "a": {"b": [[], {}]}},
}


def key(record):
    return record["id"]


def test_round_trip_is_exact_and_keeps_order(tmp_path: Path):
    path = tmp_path / "deep" / "records.jsonl"
    records = [ODD, {"id": "b", "x": 1}, {"x": 1, "id": "a"}]
    write_records(path, records)
    assert read_records(path) == records
    assert [list(record) for record in read_records(path)] == [list(record) for record in records]
    assert path.read_bytes().count(b"\n") == 3
    assert "漢🙂".encode() in path.read_bytes()
    first = path.read_bytes()
    write_records(path, read_records(path))
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["records.jsonl"]


def test_foreign_files_are_read(tmp_path: Path):
    path = tmp_path / "foreign.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\u00e9\\ud83d\\ude42"}\r\n\r\n  {"b": 1e5}  \r\n{"c": 2}')
    assert read_records(path) == [{"a": "é🙂"}, {"b": 1e5}, {"c": 2}]
    path.write_bytes(b"")
    assert read_records(path) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1', "not JSON"),
        (b'{"a": NaN}', "NaN isn't JSON"),
        (b"[1, 2]", "found list"),
        (b'"text"', "found str"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": ["\\ud83d"]}', "half of a surrogate pair"),
        (b'{"\\ude42": "\\ud83d\\ude42"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(InputError, match=said) as caught:
        read_records(path)
    assert f"{path}, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="Is a directory"):
        read_records(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", "half \ud83d"])
def test_what_json_cannot_hold_is_refused_and_leaves_the_old_file(tmp_path: Path, value):
    path = tmp_path / "records.jsonl"
    write_records(path, [{"id": "old"}])
    with pytest.raises(InputError, match="can't be written as JSON"):
        write_records(path, [{"id": "new"}, {"id": "b", "value": value}])
    assert read_records(path) == [{"id": "old"}]


def open_writer(path: Path) -> None:
    with RecordWriter(path, key):
        pass


@pytest.mark.parametrize("use", [check_writable, open_writer, lambda path: write_bytes(path, b"x")])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", "is a folder"),
        ("folder", "is a folder"),
        ("none/..", "is a folder"),
        ("file/out.jsonl", "is no folder"),
        ("file/deeper/out.jsonl", "is no folder"),
        ("x" * 256, "File name too long"),
        ("queue", "is no file that can be replaced"),
        ("loop/out.jsonl", "is no folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_and_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use, name: str, said: str
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("kept")
    os.mkfifo("queue")
    Path("loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said) as caught:
        use(Path(name))
    assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and Path("file").read_text() == "kept"


@pytest.mark.parametrize("use", [open_writer, lambda path: write_bytes(path, b"x")])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_refuses_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use, number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=f"out.jsonl: can't be written .{os.strerror(number)}"):
        use(tmp_path / "out.jsonl")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for use in (check_writable, open_writer, lambda path: write_bytes(path, b"x")):
        with pytest.raises(OSError, match=os.strerror(number)):
            use(tmp_path / "out.jsonl")


def test_a_name_that_leaves_no_room_for_the_temporary_ones_is_refused_at_once(tmp_path: Path):
    longest = "x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - len("..123456789012.partial.tmp") - 2)
    check_writable(tmp_path / longest)
    with RecordWriter(tmp_path / longest, key) as writer:
        write_records(partial_path(tmp_path / longest), [])
        writer.finish()
    with pytest.raises(InputError, match="its name is too long by 2 bytes"):
        check_writable(tmp_path / "new folder" / f"{longest}xx")
    assert not (tmp_path / "new folder").exists()


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_writable(tmp_path / "a" / "b" / "out.jsonl")
    (tmp_path / "old.jsonl").write_text("old")
    check_writable(tmp_path / "old.jsonl")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open(dir / "missing" / "x", "wb"))
    with pytest.raises(InputError, match=r"new.jsonl: can't be written"):
        check_writable(Path("new.jsonl"))


def test_28_a_writer_killed_at_any_byte_resumes_to_the_same_bytes(tmp_path: Path):
    records = [{"id": "a", "text": "x\u2028y"}, ODD, {"id": "漢", "score": 0.1}]
    whole = tmp_path / "whole.jsonl"
    write_records(whole, records)
    data = whole.read_bytes()
    path = tmp_path / "records.jsonl"
    for cut in range(len(data) + 1):
        partial_path(path).write_bytes(data[:cut])
        with RecordWriter(path, key) as writer:
            assert writer.records == records[: data[:cut].count(b"\n")]
            assert writer.done == {record["id"] for record in writer.records}
            for record in records:
                if record["id"] not in writer.done:
                    writer.write(record)
            writer.finish()
        assert path.read_bytes() == data
        assert not partial_path(path).exists()
        path.unlink()


def test_28_a_group_is_torn_until_all_of_it_is_written(tmp_path: Path):
    path, keys = tmp_path / "records.jsonl", list("abcdefg")
    with RecordWriter(path, key) as writer:
        for name in "abcd":
            assert writer.write_missing({"id": name})
    with RecordWriter(path, key) as writer:
        assert list(writer.torn_groups(keys, 3)) == [range(3, 6), range(6, 7)]
        torn = []
        for places in writer.torn_groups(keys, 3):
            torn.append(places)
            assert [writer.write_missing({"id": keys[place], "again": True}) for place in places] == [
                keys[place] != "d" for place in places
            ]
        assert torn == [range(3, 6), range(6, 7)] and list(writer.torn_groups(keys, 3)) == []
        writer.finish()
    assert [(record["id"], "again" in record) for record in read_records(path)] == [
        (name, name in "efg") for name in keys
    ]


def test_28_what_was_written_survives_a_killed_process(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    code = (
        "import os, sys\nfrom almost_jax.io.records import RecordWriter\n"
        "with RecordWriter(sys.argv[1], lambda r: r['id']) as writer:\n"
        "    writer.write({'id': 'a'})\n    writer.write({'id': 'b'})\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert not path.exists()
    with RecordWriter(path, key) as writer:
        assert writer.records == [{"id": "a"}, {"id": "b"}]


def test_a_last_line_of_zeros_is_torn_and_a_middle_one_is_damage(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    partial_path(path).write_bytes(b'{"id": "a"}\n\x00\x00\x00\n')
    with RecordWriter(path, key) as writer:
        assert writer.done == {"a"}
        writer.write({"id": "b"})
    assert partial_path(path).read_bytes() == b'{"id": "a"}\n{"id": "b"}\n'
    partial_path(path).write_bytes(b'{"id": "a"}\n\x00\n{"id": "b"}\n')
    with pytest.raises(InputError, match="line 2"), RecordWriter(path, key):
        pass


def test_a_partial_file_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    partial_path(path).write_bytes(b'{"id": "a"}\n{"id": "a"}\n')
    with pytest.raises(InputError, match="stands twice"), RecordWriter(path, key):
        pass
    partial_path(path).write_bytes(b'{"name": "a"}\n')
    with pytest.raises(InputError, match="no field 'id'"), RecordWriter(path, key):
        pass


def test_records_that_another_machine_does_not_see_yet_are_an_error(tmp_path: Path):
    with RecordWriter(tmp_path / "a.jsonl", key=lambda record: record["id"]) as writer:
        writer.write({"id": "one"})
        assert writer.records == [{"id": "one"}]
        # As process 0 says.
        writer.done.add("two")
        with pytest.raises(InputError, match=r"a.jsonl.partial: 1 of 2 records are seen here"):
            list(writer.written())


def test_two_writers_of_one_file_are_refused(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    with RecordWriter(path, key) as first:
        first.write({"id": "a"})
        with pytest.raises(InputError, match="another process is writing it"), RecordWriter(path, key):
            pass
        first.write({"id": "b"})
        first.finish()
    assert [record["id"] for record in read_records(path)] == ["a", "b"]
    with RecordWriter(path, key) as again:
        assert again.done == set()


def test_the_old_file_stays_until_finish_and_misuse_is_an_error(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    write_records(path, [{"id": "old"}])
    writer = RecordWriter(path, key)
    with pytest.raises(RuntimeError, match="isn't open"):
        writer.write({"id": "a"})
    with writer:
        writer.write({"id": "a"})
        assert read_records(path) == [{"id": "old"}]
        with pytest.raises(ValueError, match="written already"):
            writer.write({"id": "a"})
        with pytest.raises(InputError):
            writer.write({"id": "b", "x": float("nan")})
        writer.finish()
        with pytest.raises(RuntimeError, match="isn't open"):
            writer.finish()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": "a"}]


def test_a_writer_and_a_reader_keep_no_record_in_memory(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    tracemalloc.start()
    for _ in range(2):  # the second writer takes up what the first one left
        with RecordWriter(path, key) as writer:
            for number in range(len(writer.done), len(writer.done) + 400):
                writer.write({"id": str(number), "text": "x" * 10_000})
    with RecordWriter(path, key) as writer:
        assert [record["id"] for record in writer.written()] == [str(number) for number in range(800)]
        writer.finish()
    assert sum(1 for _ in iter_records(path)) == 800
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 8_000_000
    assert peak < 800_000


def test_reading_one_by_one_equals_reading_at_once(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "x\xe2\x80\xa8y"}\r\n{"a": 3}')
    assert list(iter_records(path)) == read_records(path)
    path.write_bytes(b'{"a": 1}\n{"a": \n')
    reader = iter_records(path)
    assert next(reader) == {"a": 1}
    with pytest.raises(InputError, match="line 2"):
        next(reader)
