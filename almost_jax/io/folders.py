"""Folders that appear whole or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from almost_jax.errors import InputError

# How libraries that wrap the system's error in their own say it.
_FULL = ("No space left on device", "os error 28", "RESOURCE_EXHAUSTED")


@contextmanager
def whole_folder(directory: Path, size: int) -> Iterator[Path]:
    """Fill a temporary folder beside `directory`, and give it that name at the end; it replaces what was there.

    When filling it fails, nothing is left and what was there stays.

    Args:
        directory: of that name.
        size: bytes that must be free for it: a library that fills up a disk says so in a hundred lines.

    Yields:
        The temporary folder, empty.

    Raises:
        InputError: it can't be written, as on a disk without room for it; other errors pass through.
    """
    directory = Path(directory).absolute()
    temporary = directory.with_name(f".{directory.name}.saving")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise InputError(f"{directory}: no space left on device ({size:,} bytes are needed, {free:,} are free)")
        yield temporary
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    # BaseException: an interrupt must not leave a part behind either.
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = _cause(error)
        if reason is None:
            raise
        raise InputError(f"{directory}: can't be written ({reason})") from error


def _cause(error: BaseException) -> str | None:
    """Why a disk refused, in few words; None when the error is of another kind."""
    if isinstance(error, InputError) or not isinstance(error, Exception):
        return None
    if any(sign in str(error) for sign in _FULL):
        return "No space left on device"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR):
        return error.strerror
    return None
