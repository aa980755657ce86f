"""Paths as users write them: gs://BUCKET/x is BUCKET's mount by Cloud Storage FUSE, $ALMOST_JAX_GCS/BUCKET/x on disk.

Experiments keep such paths as they were written, in config.yaml and in fingerprints too: each is turned into a path of
this machine where it is used, so that a run can go on where its buckets are mounted elsewhere.
"""

import os
import re
import shlex
from pathlib import Path

from almost_jax.errors import InputError

# Names the folder in which every bucket is mounted under its own name.
VARIABLE = "ALMOST_JAX_GCS"
DEFAULT = "/gcs"
# So that folders are there that nobody made, checkpoints can be renamed in buckets without real folders, and one host
# sees at once what another has written: on TPU hosts gcsfuse would otherwise remember names for ever.
OPTIONS = (
    "--implicit-dirs",
    "--rename-dir-limit=200000",
    "--metadata-cache-ttl-secs=0",
    "--metadata-cache-negative-ttl-secs=0",
)
# pathlib leaves one slash of two, and none where nothing follows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*))?", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]*")


def local_path(written: str | Path) -> Path:
    """Where a path that a user wrote lies on this machine; it need not exist.

    Args:
        written: a path of this machine, given back as it is, or gs://BUCKET/..., which a `Path` holds as gs:/BUCKET/...
            (A folder of this machine whose name ends with a colon is written ./name:/...)

    Raises:
        InputError: it is of another scheme, names no bucket, or its bucket isn't mounted; one line, in the last case
            with the command that mounts it.
    """
    found = _ADDRESS.fullmatch(str(written))
    if found is None:
        return Path(written)
    scheme, rest = found[1], found[2] or ""
    address = f"{scheme}://{rest}"
    if scheme != "gs":
        raise InputError(
            f"{address}: {scheme}:// is not supported; expected a path, or gs://BUCKET/... of a mounted bucket"
        )
    bucket, *parts = rest.split("/")
    if _BUCKET.fullmatch(bucket) is None or ".." in parts:
        raise InputError(f"{address}: expected gs://BUCKET/..., with a bucket's name and without '..'")
    folder = Path(os.environ.get(VARIABLE) or DEFAULT) / bucket
    if not _mounted(folder):
        state = "is empty" if folder.is_dir() else "is not there"
        raise InputError(
            f"{address}: bucket {bucket} is not mounted: {folder} {state} ({VARIABLE} may name another folder than "
            f"{DEFAULT}); mount it by: {mount_command(bucket, folder)}"
        )
    return folder.joinpath(*parts)


def mount_command(bucket: str, folder: Path) -> str:
    """The shell command that makes a bucket's folder and mounts it there."""
    place = shlex.quote(str(folder))
    return f'sudo install -d -o "$USER" {place} && gcsfuse {" ".join(OPTIONS)} {bucket} {place}'


def _mounted(folder: Path) -> bool:
    """Whether a bucket is there, itself a mount or within one; a plain folder with something in it counts as well.

    An empty one is what a mount leaves behind when it is gone: what is written to it would stay on this machine.
    """
    if not os.path.isdir(folder):
        return False
    return os.path.ismount(folder) or os.path.ismount(folder.parent) or bool(os.listdir(folder))
