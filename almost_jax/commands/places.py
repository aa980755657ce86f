"""Where commands run models: a mesh over the devices of this machine, and programs that are kept between runs."""

import os
import re
from pathlib import Path
from typing import Annotated

import jax
import typer
from jax.sharding import Mesh

from almost_jax.config import MeshConfig
from almost_jax.core.partitioning import MESH_AXES, make_mesh
from almost_jax.errors import InputError
from almost_jax.io.paths import local_path

MeshOption = Annotated[
    str | None,
    typer.Option("--mesh", help="Devices along the mesh's axes, as in fsdp=4,tensor=2; -1 takes what is left."),
]
# A key holds so many bits of a seed.
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The source of all chance.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="To compute in: float32, bfloat16 or float16.")]
DTYPES = ("float32", "bfloat16", "float16")


def on_disk(path: Path | None) -> Path | None:
    """Typer's callback of every argument and option that is a path: gs://BUCKET/... becomes where BUCKET is mounted.

    Raises:
        InputError: see `local_path`.
    """
    return None if path is None else local_path(path)


def check_dtype(dtype: str) -> None:
    """Refuse a dtype to compute in that isn't known.

    Raises:
        InputError: it isn't.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} isn't known; expected one of {', '.join(DTYPES)}")


def one_device() -> Mesh:
    """A mesh of the first device."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def parse_mesh(text: str) -> Mesh:
    """A mesh over all devices from the option's text.

    Args:
        text: sizes by axis; an axis that isn't named is 1.

    Raises:
        InputError: an axis isn't known, a size can't be, or the sizes don't fit the devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or not re.fullmatch(r"-1|[1-9][0-9]*", size):
            raise InputError(f"--mesh {text!r}: {part!r} isn't {' or '.join(f'{name}=N' for name in MESH_AXES)}")
        sizes[axis] = int(size)
    try:
        return make_mesh(MeshConfig(**sizes))
    except ValueError as error:
        line = " ".join(str(error).split())
        raise InputError(f"--mesh {text!r}: {line} ({jax.device_count()} devices)") from error


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, tiny ones too: the second run starts faster than the first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "almost_jax" / "jax"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        # A home that can't be written to costs time, not the run.
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
