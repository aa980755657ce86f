"""What a stage is given: seeds, the one model that is kept, progress in a log file."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console

from almost_jax.config import MeshConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.errors import InputError
from almost_jax.experiments import load_experiment
from almost_jax.io import progress as progress_module
from almost_jax.io import run as run_module
from almost_jax.io.progress import console_progress
from almost_jax.io.run import Run


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def make_run(experiment: Path, stream: io.StringIO, *overrides: str, tensorboard: bool = False) -> Run:
    config = load_experiment(experiment, overrides)
    return Run(experiment.parent / "run", config, make_mesh(MeshConfig()), tensorboard, Console(file=stream, width=40))


def test_seeds_differ_by_name_and_by_the_experiments_seed(micro_experiment: Path, stream: io.StringIO) -> None:
    first = make_run(micro_experiment, stream)
    other = make_run(micro_experiment, stream, "seed=1")
    # The value is held fixed: another one would change every result of every run.
    assert first.seed("queries") == 757600036
    seeds = [run.seed(name) for run in (first, other) for name in ("queries", "responses/A", "responses/B")]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []

    def load_model(source: str, mesh: Any, dtype: str) -> Any:
        calls.append((Path(source).name, dtype))
        return SimpleNamespace(params={"kernel": jnp.ones(3)})

    monkeypatch.setattr(run_module, "load_model", load_model)
    return calls


def test_the_last_model_is_kept_and_no_other(
    micro_experiment: Path, stream: io.StringIO, loads: list[tuple[str, str]]
) -> None:
    run = make_run(micro_experiment, stream, "compute_dtype=bfloat16")
    assert run.model("small") is run.model("small")
    run.model("large")
    run.model("small")
    assert loads == [("small", "bfloat16"), ("large", "bfloat16"), ("small", "bfloat16")]


def test_a_model_whose_arrays_were_donated_is_loaded_again(
    micro_experiment: Path, stream: io.StringIO, loads: list[tuple[str, str]]
) -> None:
    run = make_run(micro_experiment, stream)
    run.model("small").params["kernel"].delete()
    assert not run.model("small").params["kernel"].is_deleted()
    assert len(loads) == 2


def test_an_unknown_model_is_bad_input(micro_experiment: Path, stream: io.StringIO) -> None:
    with pytest.raises(InputError, match="there is no model 'huge'; the experiment has small, medium, large"):
        make_run(micro_experiment, stream).model("huge")


def test_progress_in_a_log_file_is_lines_that_start_where_the_stage_resumed(
    micro_experiment: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with make_run(micro_experiment, stream).progress("[bold]responses", 40, 10) as progress:
        for _ in range(15):
            clock[0] += 4.0
            progress.advance(2, loss=1.23456)
    lines = stream.getvalue().splitlines()
    # Every third step is twelve seconds after the line before; the last of them is the end and is not said twice.
    assert [line.split()[1] for line in lines] == ["10/40", "16/40", "22/40", "28/40", "34/40", "40/40"]
    assert lines[1] == "[bold]responses: 16/40  2.0 s each  0:48 left  loss 1.235"
    assert lines[-1] == "[bold]responses: 40/40  2.0 s each  in 1:00  loss 1.235"


@pytest.mark.parametrize(("steps", "said"), [(2, []), (3, ["16/40"]), (4, ["16/40", "18/40"])])
def test_a_command_says_how_far_it_is_when_it_takes_long(
    steps: int, said: list[str], stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with console_progress(Console(file=stream), "samples", 40, 10, at_once=False) as progress:
        for _ in range(steps):
            clock[0] += 4.0
            progress.advance(2)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == said


def test_progress_says_nothing_more_when_nothing_was_left_to_do(micro_experiment: Path, stream: io.StringIO) -> None:
    with make_run(micro_experiment, stream).progress("responses", 40, 40):
        pass
    assert stream.getvalue().splitlines() == ["responses: 40/40"]


def test_lines_are_said_as_they_are(micro_experiment: Path, stream: io.StringIO) -> None:
    make_run(micro_experiment, stream).say("[red]a :smile: " + "long " * 20)
    assert stream.getvalue() == "[red]a :smile: " + "long " * 20 + "\n"
