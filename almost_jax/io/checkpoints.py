"""Checkpoints: trees of arrays written by Orbax, committed by a rename, restored byte for byte onto given shardings.

Training goes on while a checkpoint is written: `save` returns once the arrays are copied, and the next save, `wait` and
`close` come after the commit. Beside its arrays every checkpoint keeps a list of its files with their digests. Orbax
alone reads a changed byte without a word, and stumbles loudly over a cut file; so the list is checked first. A torn
checkpoint (its writer was killed, a file was cut) is passed over in favour of the one before it, and so is one that
holds another tree.
"""

import functools
import hashlib
import itertools
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary, on_all, wait_for_all
from almost_jax.io.folders import check_room, refusal
from almost_jax.io.preemption import COMMIT
from almost_jax.io.records import write_bytes

FILES = "files.json"
TREE, EXTRA = "tree", "extra.json"
# Orbax gives up on a write that takes longer; a large model on a slow disk may take hours.
WRITING_SECONDS = 24 * 3600
# Saves that this process has begun.
_saves = itertools.count()


def to_stderr(line: str) -> None:
    """Print one line on standard error."""
    print(line, file=sys.stderr, flush=True)


def save_tree(folder: Path, tree: Any) -> None:
    """Write a tree of arrays, on any shardings, to a folder that doesn't exist yet; returns when all is written."""
    # Compressing weights saves little on disk, and takes their size in memory once more.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(Path(folder).absolute(), args=ocp.args.PyTreeSave(tree))


def restore_tree(folder: Path, expected: Any) -> Any:
    """Read what `save_tree` wrote; damage must have been ruled out before, see `find_damage`.

    Args:
        folder: what was written.
        expected: the same tree of arrays, or of `jax.ShapeDtypeStruct`; its shardings are those restored onto, and
            where it has none, one device.

    Raises:
        InputError: another tree is stored; names the leaf, what is found and what is expected.
    """
    folder = Path(folder).absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shaped: Any = jax.ShapeDtypeStruct
    target = jax.tree.map(lambda x: shaped(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here), expected)
    # Processes read without waiting for each other: one that can't mustn't leave the others waiting inside Orbax.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
        check_tree(checkpointer.metadata(folder).item_metadata.tree, target, str(folder))
        return checkpointer.restore(folder, args=ocp.args.StandardRestore(target))


def check_tree(found: Any, expected: Any, where: str) -> None:
    """Compare two trees by path, shape and dtype.

    Args:
        found: what is stored: a tree of anything with `shape` and `dtype`.
        expected: what was asked for, likewise.
        where: the checkpoint, for messages.

    Raises:
        InputError: names the first leaf that is missing, has another shape or dtype, or is left over.
    """
    stored, wanted = ocp.tree.to_flat_dict(found, sep="/"), ocp.tree.to_flat_dict(expected, sep="/")
    for name, leaf in wanted.items():
        if name not in stored:
            raise InputError(f"{where}: leaf {name} is missing; expected {_kind(leaf)}")
        if _kind(stored[name]) != _kind(leaf):
            raise InputError(f"{where}: leaf {name} is {_kind(stored[name])}; expected {_kind(leaf)}")
    for name, leaf in stored.items():
        if name not in wanted:
            raise InputError(f"{where}: leaf {name}, {_kind(leaf)}, is left over; the tree asked for has no such leaf")


def seal(folder: Path) -> None:
    """List the files of a finished folder, with sizes and SHA-256 digests, in its `files.json`."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in paths}
    write_bytes(folder / FILES, json.dumps(listed, indent=1).encode())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the first file that is missing, cut or changed; None when nothing is."""
    try:
        listed = json.loads((Path(folder) / FILES).read_bytes())
        for name, (size, digest) in listed.items():
            path = Path(folder) / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if _digest(path) != digest:
                return f"{name} isn't what was written"
    except FileNotFoundError:
        return f"{FILES} is missing"
    except OSError as error:
        return f"{error.filename or FILES} can't be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{FILES} can't be read"
    return None


class Checkpoints:
    """The newest `keep` checkpoints of a training run: per step a tree of arrays and a small JSON object."""

    def __init__(self, directory: Path, keep: int, say: Callable[[str], None] = to_stderr) -> None:
        """Name the folder; it is made at the first save.

        Args:
            directory: holds one folder per step, named by the step alone.
            keep: how many stay, at least 1; older ones go once a new one is whole.
            say: told, in one line, of each checkpoint that is passed over.
        """
        if keep < 1:
            raise ValueError(f"keep {keep} checkpoints? At least 1 must stay")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._say = say
        self._writing: _Writing | None = None
        # Torn or foreign: what `restore` couldn't go on from.
        self._passed_over: set[int] = set()

    def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
        """Begin to write a checkpoint, after the one before it is whole; the arrays may be donated at once.

        Checkpoints of later steps, left by a run that is being repeated, and those that `restore` passed over are
        removed once this one is whole.

        Args:
            step: 0 or more.
            tree: arrays on any shardings.
            extra: what JSON can hold, exactly.

        Raises:
            InputError: there is no room on the disk, for this checkpoint or the one before it; what was whole stays.
        """
        self.wait()
        text = json.dumps(extra, allow_nan=False).encode()
        temporary = self.directory / f".saving-{step}"
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            # What a killed process was writing takes room.
            self._remove_unfinished()
            check_room(temporary, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
            temporary.mkdir()
        wait_for_all()
        self._writing = _Writing(temporary / TREE, tree, lambda: self._commit(step, temporary, text))

    def wait(self) -> None:
        """Come back when what `save` has begun is whole on disk.

        Raises:
            InputError: it can't be written, as on a full disk; what was whole before stays.
        """
        writing = self._writing
        if writing is None:
            return
        try:
            # What interrupts the wait leaves the writing alone: it goes on, and can be waited for again.
            writing.finish()
            self._writing = None
            # They are gone now, on every process.
            self._passed_over.clear()
        except Exception as error:
            self._writing = None
            self._remove_unfinished()
            reason = refusal(error)
            if reason is None:
                raise
            steps = self._listed()
            last = f"step {max(steps)} is the last whole one" if steps else "there is no whole one"
            raise InputError(
                f"{self.directory}: the checkpoint can't be written ({reason}); {last}: "
                "make room, then the same command goes on from there"
            ) from error

    def _commit(self, step: int, temporary: Path, text: bytes) -> None:
        """Give a written checkpoint its name; the first process alone."""
        final = self.directory / str(step)
        (temporary / EXTRA).write_bytes(text)
        seal(temporary)
        # The only moment without this step on disk, and the one before it is still there.
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        earlier = [other for other in self._listed() if other < step]
        kept = [*earlier, step][-self._keep :]
        for other in self._on_disk():
            if other not in kept:
                shutil.rmtree(self.directory / str(other), ignore_errors=True)

    def restore(self, expected: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Read the latest checkpoint that is whole and holds this tree; the folder is not changed.

        Those that are passed over on the way are no longer listed. All processes must come here, and go on from the
        same one.

        Args:
            expected: the tree, as arrays or `jax.ShapeDtypeStruct`; its shardings are those restored onto, and where it
                has none, one device.

        Returns:
            (step, tree, extra), or None when there is no whole checkpoint.

        Raises:
            InputError: every whole checkpoint holds another tree; names the leaf, what is found and what is expected.
            Exception: whatever kept every whole checkpoint from being read.
        """
        self.wait()
        failure: Exception | None = None
        passed_over: set[int] = set()
        # One process looks, so that all go on from the same one, and the files are read once more by one alone.
        for step in from_primary(lambda: self._on_disk()[::-1]):
            folder = self.directory / str(step)
            damage = from_primary(functools.partial(find_damage, folder))
            if damage is None:
                found: tuple[Any, dict[str, Any]] | None = None
                try:
                    found = restore_tree(folder / TREE, expected), json.loads((folder / EXTRA).read_bytes())
                except InputError as error:
                    self._say(f"{folder}: foreign checkpoint passed over ({error})")
                    failure = failure or error
                except Exception as error:  # Orbax raises many kinds
                    damage = f"it can't be read: {' '.join(f'{type(error).__name__}: {error}'.split())}"
                    failure = failure or error
                if on_all(found is not None) and found is not None:
                    self._passed_over = passed_over
                    return step, *found
                if found is not None:
                    damage = "another process can't read it"
                    failure = failure or InputError(f"{folder}: {damage}")
            if damage is not None:
                self._say(f"{folder}: torn checkpoint passed over ({damage})")
            passed_over.add(step)
        if failure is not None:
            # Nothing fits: to start over in silence would throw away what may only have been misplaced.
            raise failure
        self._passed_over = passed_over
        return None

    def steps(self) -> list[int]:
        """The steps committed, ascending, after what is being written, but for those that `restore` passed over.

        All processes must come here.
        """
        self.wait()
        return from_primary(self._listed)

    def _listed(self) -> list[int]:
        return [step for step in self._on_disk() if step not in self._passed_over]

    def _on_disk(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def close(self) -> None:
        """Wait for what is being written, and remove what a killed save left.

        Raises:
            InputError: see `wait`.
        """
        self.wait()
        self._remove_unfinished()

    def __enter__(self) -> "Checkpoints":
        """The checkpoints themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for path in self.directory.glob(".saving-*"):
                shutil.rmtree(path, ignore_errors=True)


class _Writing:
    """A tree on its way to disk, and what is done once it is there.

    It is committed in the background, as soon as all processes have written their part. They wait for each other at
    the coordinator, not by a collective on the devices, which would get among those of the training that goes on.
    """

    def __init__(self, folder: Path, tree: Any, commit: Callable[[], None]) -> None:
        # On a CPU "a copy on the host" is the array itself, which the next step overwrites.
        own = jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False), timeout_secs=WRITING_SECONDS
        )
        self._checkpointer.save(folder, args=ocp.args.PyTreeSave(own))
        self._commit = commit
        # Barriers have names of their own; all processes save alike, and so count alike.
        self._number = next(_saves)
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._error: BaseException | None = None
        # Not the thread's `join`, which takes a thread for ended once an interrupt has broken off the wait for it.
        self._ended = threading.Event()
        # Not a daemon: a process that ends by itself ends after the commit.
        threading.Thread(target=self._work, name=COMMIT).start()

    def finish(self) -> None:
        """Wait until it is committed; raises what went wrong on the way."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
            self._wait_for_all("written")
            if jax.process_index() == 0:
                self._commit()
            self._wait_for_all("committed")
            self._checkpointer.close()
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _wait_for_all(self, what: str) -> None:
        """A barrier of all processes; nothing when there is one."""
        self._barrier(key=f"checkpoint {self._number} {what}", timeout_ms=WRITING_SECONDS * 1000)


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)} of shape {tuple(leaf.shape)}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
