"""Checkpoints: trees of arrays written by Orbax, committed by a rename, restored byte for byte onto given shardings.

Beside its arrays every checkpoint keeps a list of its files with their digests. Orbax alone reads a changed byte
without a word, and stumbles loudly over a cut file; so the list is checked first. A torn checkpoint (its writer was
killed, a file was cut) is passed over in favour of the one before it; one that holds another tree is an error.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from almost_jax.errors import InputError
from almost_jax.io.records import write_bytes

FILES = "files.json"
TREE, EXTRA = "tree", "extra.json"


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
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
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
            say: told, in one line, of each torn checkpoint that is passed over.
        """
        if keep < 1:
            raise ValueError(f"keep {keep} checkpoints? At least 1 must stay")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._say = say

    def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
        """Write a checkpoint; it is on disk when this returns, so the arrays may be donated at once.

        Checkpoints of later steps, left by a run that is being repeated, are removed.

        Args:
            step: 0 or more.
            tree: arrays on any shardings.
            extra: what JSON can hold, exactly.
        """
        temporary, final = self.directory / f".saving-{step}", self.directory / str(step)
        text = json.dumps(extra, allow_nan=False).encode()
        primary = jax.process_index() == 0
        if primary:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _wait_for_all(f"{temporary} made")
        save_tree(temporary / TREE, tree)
        _wait_for_all(f"{temporary} written")
        if primary:
            (temporary / EXTRA).write_bytes(text)
            seal(temporary)
            # The only moment without this step on disk, and the one before it is still there.
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._remove_others(step)
        _wait_for_all(f"{final} committed")

    def restore(self, expected: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Read the latest whole checkpoint; the folder is not changed.

        Args:
            expected: the tree, as arrays or `jax.ShapeDtypeStruct`; its shardings are those restored onto, and where it
                has none, one device.

        Returns:
            (step, tree, extra), or None when there is no whole checkpoint.

        Raises:
            InputError: another tree is stored; names the leaf, what is found and what is expected.
        """
        for step in reversed(self.steps()):
            folder = self.directory / str(step)
            damage = find_damage(folder)
            if damage is not None:
                self._say(f"{folder}: torn checkpoint passed over ({damage})")
                continue
            return step, restore_tree(folder / TREE, expected), json.loads((folder / EXTRA).read_bytes())
        return None

    def steps(self) -> list[int]:
        """The steps committed, ascending; torn ones are among them."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def close(self) -> None:
        """Nothing is pending after a save; remove what a killed one left."""
        if jax.process_index() == 0:
            for path in self.directory.glob(".saving-*"):
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> "Checkpoints":
        """The checkpoints themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _remove_others(self, step: int) -> None:
        steps = self.steps()
        kept = [other for other in steps if other <= step][-self._keep :]
        for other in steps:
            if other not in kept:
                shutil.rmtree(self.directory / str(other), ignore_errors=True)
        self.close()


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)} of shape {tuple(leaf.shape)}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait_for_all(name: str) -> None:
    """A barrier of all processes; nothing when there is one."""
    ocp.multihost.sync_global_processes(name)
