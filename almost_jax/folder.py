"""A run's folder between its stages: status.json, the lock, and outputs that are set aside and brought back."""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias

import almost_jax
from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary
from almost_jax.io.records import write_bytes

Entry: TypeAlias = dict[str, Any]
Status: TypeAlias = dict[str, Entry]

VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
# How often a lock is tried for, and the seconds in between.
_LOOKS, _BETWEEN_LOOKS = 4, 0.05
NEEDED = {"state", "fingerprint", "values", "upstream", "outputs", "seconds"}


def read_status(directory: Path) -> Status:
    """The entries of the stages that have begun, from status.json; none where there is no such file.

    Raises:
        InputError: it is damaged.
    """
    path = directory / "status.json"
    if not path.exists():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        found = {str(name): dict(entry) for name, entry in stages.items() if entry["state"] != "pending"}
        for name, entry in found.items():
            if lacks := NEEDED - set(entry):
                raise ValueError(f"{name} lacks {min(lacks)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error}); move it away and the stages' outputs are set aside") from error
    return found


def write_status(directory: Path, status: Status, stages: Sequence[str]) -> None:
    """Write status.json at once, in the order of `stages`; those that have not run are pending."""
    content = {"stages": {name: status.get(name, {"state": "pending"}) for name in stages}}
    # Summaries may hold NumPy scalars.
    text = json.dumps(content, indent=1, ensure_ascii=False, default=lambda value: value.item())
    write_bytes(directory / "status.json", f"{text}\n".encode())


def is_locked(directory: Path) -> bool:
    """Whether a process is working in the folder."""
    try:
        with (directory / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        # Some file systems know no locks.
        return False
    return False


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep others out of the folder; the lock ends with the process, however it ends.

    Of several processes that share a run, process 0 holds it.
    """
    held: list[IO[str]] = []
    try:
        # One that is refused must not go on, nor leave the others waiting.
        from_primary(lambda: held.append(_lock(directory)))
        yield
    finally:
        for file in held:
            file.close()


def _lock(directory: Path) -> IO[str]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Opened for appending, so that a loser does not wipe the winner's line.
        file = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: can't be used as a run's folder ({error.strerror})") from error
    try:
        for _ in range(_LOOKS):
            # Who only looks whether it is locked holds it for a moment too.
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_BETWEEN_LOOKS)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{directory}: is in use by {holder}; wait for it, or give another --out") from error
    except OSError:
        # Some file systems know no locks: nobody is kept out there.
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def owned(name: str, outputs: Sequence[str]) -> list[str]:
    """All paths that a stage may write, unfinished files and TensorBoard's included."""
    events = dict.fromkeys(f"tensorboard/{one}" for one in (name, *outputs))
    return [*outputs, *(f"{output}.partial" for output in outputs), *events]


def set_aside(directory: Path, name: str, paths: Sequence[str], entry: Entry | None) -> None:
    """Move a stage's own outputs, and no others, to stale/, with what status.json says of them."""
    shelf = _shelf(directory, name, entry["fingerprint"] if entry else f"{time.time_ns():x}")
    shelf.mkdir(parents=True, exist_ok=True)
    # The entry first: with it, outputs of which some were moved before a kill or on a full disk are brought back.
    if entry is not None:
        write_bytes(shelf / "entry.json", json.dumps(entry).encode())
    for path in paths:
        if (directory / path).exists():
            _move(directory / path, shelf / path)


def set_aside_entry(directory: Path, name: str, fingerprint: str) -> Entry | None:
    """What status.json said of outputs with this fingerprint that lie in stale/; None if there are none."""
    path = _shelf(directory, name, fingerprint) / "entry.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def bring_back(directory: Path, name: str, paths: Sequence[str], fingerprint: str) -> bool:
    """Move a stage's outputs from stale/ back to their places; whether there were any."""
    shelf = _shelf(directory, name, fingerprint)
    there = [path for path in paths if (shelf / path).exists()]
    for path in there:
        _move(shelf / path, directory / path)
    shutil.rmtree(shelf)
    return bool(there)


def _shelf(directory: Path, name: str, fingerprint: str) -> Path:
    return directory / "stale" / f"{name}-{fingerprint[:12]}"


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions that a stage ran with."""
    found = {"python": platform.python_version(), "almost_jax": almost_jax.__version__}
    return found | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


def git_commit() -> str | None:
    """The commit of the code, with `+` where files were changed since; None outside a checkout."""
    package = str(Path(almost_jax.__file__).parent)
    command = ["git", "-C", package, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
