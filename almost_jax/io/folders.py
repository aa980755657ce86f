"""Folders that appear whole or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary, is_primary, wait_for_all

# What files take beside their content: blocks that are not full, indices, metadata.
SPARE_BYTES = 2**20
# How libraries that wrap the system's error in their own say it.
_FULL = ("No space left on device", "os error 28")
# So they say it too, and that memory is used up.
_USED_UP, _OF_MEMORY = "RESOURCE_EXHAUSTED", ("out of memory", "allocat")


@contextmanager
def whole_folder(directory: Path, size: int) -> Iterator[Path]:
    """Fill a temporary folder beside `directory`, and give it that name at the end; it replaces what was there.

    When filling it fails, nothing is left and what was there stays. With several processes, process 0 makes and renames
    the folder; all are given its name and may write their parts.

    Args:
        directory: of that name.
        size: bytes of content that it must have room for; see `check_room`.

    Yields:
        The temporary folder, empty.

    Raises:
        InputError: it can't be written, as on a disk without room for it; other errors pass through.
    """
    directory = Path(directory).absolute()
    temporary = directory.with_name(f".{directory.name}.saving")
    made: list[Path] = []

    def make() -> None:
        made.extend(_missing_parents(directory))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        check_room(directory, size)

    def commit() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)

    try:
        from_primary(make)
        yield temporary
        wait_for_all()
        from_primary(commit)
    # BaseException: an interrupt must not leave a part behind either.
    except BaseException as error:
        if is_primary():
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            # One that something else has filled meanwhile stays.
            with suppress(OSError):
                parent.rmdir()
        reason = refusal(error)
        if reason is None:
            raise
        raise InputError(f"{directory}: can't be written ({reason})") from error


def check_room(directory: Path, size: int) -> None:
    """See that a disk has room for so many bytes and some more: a library that fills one up says so in a hundred lines.

    Args:
        directory: a folder's name; it need not exist, but the folder that it lies in must.
        size: of the content, in bytes.

    Raises:
        InputError: there is too little room.
    """
    needed = size + size // 1000 + SPARE_BYTES
    free = shutil.disk_usage(directory.parent).free
    if free < needed:
        raise InputError(f"{directory}: no space left on device ({needed:,} bytes are needed, {free:,} are free)")


def _missing_parents(directory: Path) -> list[Path]:
    """The folders above it that don't exist, the innermost first."""
    return [parent for parent in directory.parents if not parent.exists()]


def refusal(error: BaseException) -> str | None:
    """Why a disk refused, in few words; None when the error is of another kind."""
    if isinstance(error, InputError) or not isinstance(error, Exception):
        return None
    said = str(error)
    used_up = _USED_UP in said and not any(sign in said.lower() for sign in _OF_MEMORY)
    if used_up or any(sign in said for sign in _FULL):
        return "No space left on device"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "No space left on device"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR):
        return error.strerror
    return None
