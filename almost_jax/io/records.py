"""Records: JSON lines on disk, written atomically and in order: a killed stage continues without gap or repeat.

JSON is UTF-8 with keys in insertion order and floats by `repr` (they read back exactly); NaN and infinities aren't JSON
and are refused. Lines end at a line feed alone: U+2028 and its like may stand inside a text.

Where several processes share a run, process 0 alone writes, and all read from the file system that they share.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeAlias

from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary, is_primary, wait_for_all

Record: TypeAlias = dict[str, Any]

# What a place that can't be written to answers. A full disk or quota is another matter: it stays an OSError.
_NO_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
# By so many bytes the names are longer by which a file is written: ".", ".partial", a digest, ".tmp".
_LONGER_NAMES = 28


def dump_record(record: Record) -> bytes:
    """One record as a line of UTF-8 JSON, newline included.

    Raises:
        InputError: a value that JSON or UTF-8 can't hold (NaN, infinity, an object, half a surrogate pair).
    """
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"record can't be written as JSON ({error}): {str(record)[:200]!r}") from error


def parse_records(data: bytes, name: str) -> list[Record]:
    """The records of a whole file's bytes; blank lines are passed over, a byte-order mark is dropped.

    Args:
        data: the file's content.
        name: the file, for messages.

    Raises:
        InputError: a line that isn't a JSON object in UTF-8; names file and line.
    """
    records: list[Record] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            records.append(_parse(line, f"{name}, line {number}"))
    return records


def read_records(path: Path) -> list[Record]:
    """Every record of a JSON-lines file, in order.

    Raises:
        InputError: the file is missing, or a line isn't a JSON object; names file and line.
    """
    def read() -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror}); expected a JSON-lines file") from error

    return parse_records(from_primary(read), str(path))


def iter_records(path: Path) -> Iterator[Record]:
    """The records of a JSON-lines file one by one, for files that need not fit into memory.

    Raises:
        InputError: as `read_records`, when the line at fault is reached.
    """
    return (record for _, record in numbered_records(path))


def numbered_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The same, each with the number of its line, from 1.

    Raises:
        InputError: as `read_records`, when the line at fault is reached.
    """
    try:
        file = Path(path).open("rb")
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); expected a JSON-lines file") from error
    with file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, _parse(line.removesuffix(b"\n"), f"{path}, line {number}")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a whole file at once: readers see the old file or the new one, never a part.

    Raises:
        InputError: a record that can't be written as JSON.
    """
    write_bytes(path, b"".join(dump_record(record) for record in records))
    wait_for_all()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content atomically: a temporary file beside it, synced, then renamed.

    Raises:
        InputError: nothing can be written there; see `check_writable`.
    """
    if not is_primary():
        return
    path = Path(path)
    _check_name(path)
    with _place_refused(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            # On a full disk it holds the last bytes.
            temporary.unlink(missing_ok=True)
            raise


def _longest_name(folder: Path) -> int:
    """The bytes that a file's name may have there."""
    with contextlib.suppress(OSError):
        return os.pathconf(folder, "PC_NAME_MAX")
    return 255


def check_writable(path: Path) -> None:
    """See that a file can be written at `path`, before anything is computed for it; nothing is left there.

    Folders above it need not exist. A file that is there may be replaced.

    Raises:
        InputError: it is a folder or a device, has no name, lies below a file, or its folder refuses to be written to.
    """
    path = Path(path)

    def look() -> None:
        _check_name(path)
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        over = len(os.fsencode(path.name)) + _LONGER_NAMES - _longest_name(folder)
        if over > 0:
            raise InputError(f"{path}: can't be written, as its name is too long by {over} bytes")
        with _place_refused(path):
            # Permissions alone don't tell: disks may be mounted to be read only.
            with tempfile.TemporaryFile(dir=folder):
                pass

    from_primary(look)


def _check_name(path: Path) -> None:
    """Refuse what is no file's name, or is taken by something else than a file."""
    with _place_refused(path):
        if path.name in ("", "..") or path.is_dir():
            raise InputError(f"{path}: is a folder; expected a file's name")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no file that can be replaced; expected another name")
        for parent in path.parents:
            if os.path.lexists(parent):
                if not parent.is_dir():
                    raise InputError(f"{path}: can't be written ({parent} is no folder)")
                break


@contextlib.contextmanager
def _place_refused(path: Path) -> Iterator[None]:
    """What a place says that can't be written to, as bad input; other errors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        raise InputError(f"{path}: can't be written ({error.strerror})") from error


def partial_path(path: Path) -> Path:
    """Where a `RecordWriter` keeps its lines until it finishes: `queries.jsonl.partial` for `queries.jsonl`."""
    return Path(path).with_name(Path(path).name + ".partial")


def parse_partial(data: bytes, name: str) -> tuple[list[Record], int]:
    """The complete records of a file whose writer may have been killed, and how many bytes they take.

    A last line without newline, or that isn't a JSON object, is torn and not counted.

    Raises:
        InputError: a bad line before the last one: that is damage, not a kill.
    """
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    records: list[Record] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(line, f"{name}, line {number}"))
        except InputError:
            if number < len(lines):
                raise
            break
        size += len(line) + 1
    return records, size


class RecordWriter:
    """Appends records to a partial file that becomes `path` when all are written; takes up where a kill left off.

    Use as a context manager. On open the complete lines of an earlier partial file are read and a torn last line is
    cut off. Leaving the context without `finish` keeps the partial file for the next time. An existing `path` stays as
    it is until `finish` replaces it. Of what is written only the keys stay in memory.

    Attributes:
        done: the keys of the records written so far.
    """

    def __init__(self, path: Path, key: Callable[[Record], str]) -> None:
        """Prepare; nothing is touched before the context is entered.

        Args:
            path: the finished file.
            key: what identifies a record, such as its query's id.
        """
        self.path = Path(path)
        self.key = key
        self.done: set[str] = set()
        self._file: IO[bytes] | None = None

    @property
    def records(self) -> list[Record]:
        """What is written so far, in order, read back from the file: take `written` where it may be long."""
        return list(self.written())

    def written(self) -> Iterator[Record]:
        """What is written so far, one by one in order, read back from the file."""
        path = self.path if self._file is None else partial_path(self.path)
        # Process 0 may lag behind, and while others read it may write on. They see what is on the disk.
        from_primary(self._sync)
        return _so_many(iter_records(path), len(self.done), path)

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "RecordWriter":
        """Open the partial file and read what is in it.

        Raises:
            InputError: nothing can be written there (see `check_writable`), or the partial file is damaged before its
                last line, or holds a key twice.
        """
        self.done = from_primary(self._open)
        if self._file is None:
            # Elsewhere than on process 0 what is written goes nowhere.
            self._file = open(os.devnull, "wb")  # noqa: SIM115
        return self

    def _open(self) -> set[str]:
        _check_name(self.path)
        with _place_refused(self.path):
            return self._opened_partial(partial_path(self.path))

    def _opened_partial(self, partial: Path) -> set[str]:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("ab")
        try:
            self._lock(file, partial)
            done, size = self._read_partial(partial)
            file.truncate(size)
        except BaseException:
            file.close()
            raise
        self._file = file
        return done

    def _lock(self, file: IO[bytes], partial: Path) -> None:
        """Keep other processes from writing the same file, for as long as it is open."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{partial}: another process is writing it; wait for it, or name another file") from error
        except OSError:
            # Some file systems know no locks.
            return
        if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            # It was given its final name between opening and locking.
            raise InputError(f"{partial}: another process has just finished it; is {self.path} what you want?")

    def _read_partial(self, partial: Path) -> tuple[set[str], int]:
        """The keys of the whole lines, and the bytes that they take."""
        done: set[str] = set()
        size = 0
        for number, (record, length) in enumerate(_whole_lines(partial), start=1):
            try:
                name = self.key(record)
            except KeyError as error:
                raise InputError(f"{partial}, line {number}: no field {error}; delete it to start over") from error
            if name in done:
                raise InputError(f"{partial}, line {number}: key {name!r} stands twice; delete it to start over")
            done.add(name)
            size += length
        return done, size

    def write(self, record: Record) -> None:
        """Append one record; it survives a kill of the process from here on.

        Raises:
            InputError: the record can't be written as JSON.
            ValueError: its key is written already.
            RuntimeError: the writer isn't open.
        """
        file = self._opened()
        name = self.key(record)
        if name in self.done:
            raise ValueError(f"{self.path}: a record with key {name!r} is written already")
        file.write(dump_record(record))
        file.flush()
        self.done.add(name)

    def write_missing(self, record: Record) -> bool:
        """Append one record whose key may be written already; whether it was not. Raises as `write` does."""
        missing = self.key(record) not in self.done
        if missing:
            self.write(record)
        return missing

    def torn_groups(self, keys: Sequence[str], size: int) -> Iterator[range]:
        """The places of every `size` neighbours among the keys of which not all are written.

        Who computes such a group whole, and hands all of it to `write_missing`, computes every record in the company,
        and by the programs, that it would have had in a run that was never stopped.
        """
        for first in range(0, len(keys), size):
            group = range(first, min(first + size, len(keys)))
            if not self.done.issuperset(keys[place] for place in group):
                yield group

    def finish(self) -> None:
        """Give the file its final name; nothing can be written after.

        Raises:
            RuntimeError: the writer isn't open.
        """
        file = self._opened()
        # Others may still read what they were given by its unfinished name.
        wait_for_all()
        if is_primary():
            self._sync()
            os.replace(partial_path(self.path), self.path)
        file.close()
        self._file = None
        wait_for_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; without `finish` it stays partial."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise RuntimeError(f"{self.path}: the writer isn't open; use it as a context manager, and finish once")
        return self._file


def _so_many(records: Iterator[Record], count: int, path: Path) -> Iterator[Record]:
    """The first `count` records of a file that was just written, on whichever machine."""
    found = 0
    for record in itertools.islice(records, count):
        found += 1
        yield record
    if found < count:
        raise InputError(f"{path}: {found} of {count} records are seen here; processes must share one file system")


def _whole_lines(partial: Path) -> Iterator[tuple[Record, int]]:
    """The records of a partial file and the bytes that each takes, up to a torn last line."""
    if not partial.exists():
        return
    with partial.open("rb") as file:
        line, number = file.readline(), 1
        while line.endswith(b"\n"):
            following = file.readline()
            try:
                record = _parse(line[:-1], f"{partial}, line {number}")
            except InputError:
                # Damage, unless it is the last whole line: its writer was killed.
                if following.endswith(b"\n"):
                    raise
                return
            yield record, len(line)
            line, number = following, number + 1


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} isn't JSON")


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_not_json)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}: {line[:80]!r}")
    if b"\\u" in line and not _is_text(record):
        raise InputError(f"{where}: holds half of a surrogate pair, which is no text: {line[:80]!r}")
    return record


def _is_text(record: Record) -> bool:
    """Whether every text can be written as UTF-8: JSON's escapes can name halves of surrogate pairs, which can't."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
