"""gs:// paths: a bucket is the folder where Cloud Storage FUSE has mounted it.

A path is translated once, where it comes in (a command's arguments, an experiment file), so that everything behind
that reads and writes files.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from almost_jax.errors import InputError

# Names the folder that buckets are mounted in, each under its own name.
MOUNTS, DEFAULT_MOUNTS = "ALMOST_JAX_GCS", "/gcs"
# Whole, or what stands behind "key=" or a comma, as in `models.large=gs://...` and `pretrained=gs://...,dtype=...`.
_IN_ARGUMENT = re.compile(r"(?:(?<=^)|(?<==)|(?<=,))gs:/[^,]*")


def local_path(path: str) -> str:
    """Where a path lies on this machine: `gs://BUCKET/x` in the mounted bucket, anything else where it says.

    Raises:
        InputError: no bucket is named, or it isn't mounted.
    """
    if not path.startswith("gs:/"):
        return path
    found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]*)(/.*)?", path)
    if found is None:
        raise InputError(f"{path}: should be gs://BUCKET/PATH")
    bucket, rest = found[1], found[2] or ""
    folder = Path(os.environ.get(MOUNTS) or DEFAULT_MOUNTS) / bucket
    if not folder.is_dir():
        raise InputError(
            f"{path}: the bucket isn't mounted at {folder} ({MOUNTS} names another folder than {DEFAULT_MOUNTS}); "
            f"mount it by `gcsfuse --implicit-dirs {bucket} {folder}`"
        )
    return f"{folder}{rest}"


def local_arguments(arguments: Sequence[str]) -> list[str]:
    """Command line arguments with their gs:// paths as `local_path` has them.

    Raises:
        InputError: as `local_path`.
    """
    return [_IN_ARGUMENT.sub(lambda found: local_path(found[0]), argument) for argument in arguments]
