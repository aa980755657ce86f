"""Test set-up: eight fake CPU devices, strict promotion, and a compilation cache kept between runs."""

import gc
import importlib.util
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

# Read when jax is first imported, so these lines come before every other import.
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"


def _known(flag: str) -> bool:
    """Whether this version of XLA has a flag; it exits at one that it hasn't."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.submodule_search_locations is not None
    for library in Path(spec.submodule_search_locations[0]).glob("libjax_common*"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.encode()) >= 0
    return False


_flags = [
    flag for flag in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in flag
]
# Programs that aren't optimised compile in half the time without the newer emitters; optimised ones are slower so.
if _known("xla_cpu_use_fusion_emitters"):
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_flags, f"--xla_force_host_platform_device_count={DEVICES}"])

import jax  # noqa: E402
import pytest  # noqa: E402

from almost_jax.sampling import programs  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile far more than they compute.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# What runs whole pipelines in processes of its own; first, so that no worker is left alone with it at the end.
LONGEST = ("test_resume.py", "test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert jax.device_count() == DEVICES, "jax was imported before tests/conftest.py could ask for fake devices"


@pytest.fixture(scope="module", autouse=True)
def _programs_let_go() -> Iterator[None]:
    """Compiled programs are dropped after each file: a worker that keeps them all holds gigabytes, and, with the pieces
    of memory that each of them maps, comes near the 65,530 that Linux allows a process.
    """
    yield
    for kept in vars(programs).values():
        if hasattr(kept, "cache_clear"):
            kept.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def experiments_folder() -> Path:
    """The folder of the shipped experiment files."""
    return Path(__file__).parents[1] / "experiments"


@pytest.fixture
def micro_experiment(tmp_path: Path) -> Path:
    """An experiment file on the micro-world's settings, its models being folders with a file each in tmp_path."""
    for name in ("small", "medium", "large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name, encoding="utf-8")
    base = Path(__file__).parents[1] / "experiments" / "microworld.yaml"
    models = "\n".join(f"  {name}: {tmp_path / name}" for name in ("small", "medium", "large"))
    path = tmp_path / "experiment.yaml"
    path.write_text(f"base: {base}\nname: probe\nppo: {{kl_coef: 0.05}}\nmodels:\n{models}\n", encoding="utf-8")
    return path
