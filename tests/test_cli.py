"""The command line: exit codes, one line for bad input, what is printed, and the whole chain (slow)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almost_jax import cli, pipeline
from almost_jax.commands import runs
from almost_jax.errors import InputError, TrainingDiverged
from almost_jax.io.run import Run
from almost_jax.pipeline import STAGES
from almost_jax.report import page, sweep

ROOT = Path(__file__).parents[1]
NAMES = [stage.name for stage in STAGES]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, written.out, written.err


@pytest.fixture(autouse=True)
def _tests_keep_their_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "keep_compiled_programs", lambda: None)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_found_and_says_how_it_is_used(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = command(capsys, name, "--help")
    assert code == 0 and out.startswith(f"Usage: almost-jax {name} [OPTIONS]") and len(out.splitlines()) > 6


def test_the_list_of_commands_says_a_line_of_each_and_imports_none() -> None:
    code = "import sys; from almost_jax import cli\ntry: cli.main()\nfinally: assert 'jax' not in sys.modules"
    listed = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    shown = listed.stdout.partition("Commands:")[2].splitlines()[1:]
    assert [line.split()[0] for line in shown] == list(cli.COMMANDS), listed.stderr
    mistaken = subprocess.run([sys.executable, "-c", code, "rn"], capture_output=True, text=True, check=False)
    assert mistaken.returncode == 2
    assert mistaken.stderr == "almost-jax: No such command 'rn'. Did you mean 'run'? (see almost-jax --help)\n"


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Run], Any]]:
    """Stages that do nothing but write report.md; put a function under a stage's name to run that."""
    functions: dict[str, Callable[[Run], Any]] = {}

    def stand_in(name: str) -> Callable[[Run], dict[str, Any]]:
        def run_stage(run: Run) -> dict[str, Any]:
            return functions[name](run) if name in functions else {}

        return run_stage

    stages = tuple(dataclasses.replace(stage, run=stand_in(stage.name)) for stage in STAGES)
    monkeypatch.setattr(pipeline, "STAGES", stages)
    monkeypatch.setattr(page, "summary_table", lambda directory: f"table of [bold]{directory.name}")
    return functions


def raises(error: BaseException) -> Callable[[Run], Any]:
    def run_stage(run: Run) -> Any:
        raise error

    return run_stage


def is_one_line(text: str) -> bool:
    return text.startswith("almost-jax: ") and text.endswith("\n") and text.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nowhere.yaml"], "there is no such experiment file"),
        (["run", "{experiment}", "ppo.kl_coeff=1"], "did you mean ppo.kl_coef?"),
        (["run", "{experiment}", "ppo.steps=ten"], "ppo.steps: must be a valid integer, not 'ten'"),
        (["run", "{experiment}", "models.small=/nowhere"], "models.small: '/nowhere': there is no folder"),
        (["run", "{experiment}", "--until", "rewrd"], "did you mean reward"),
        (["sweep", "{experiment}"], "has no `sweep:`"),
        (["status", "{folder}"], "is no run's folder"),
        (["report", "{folder}"], "is no run's folder"),
        (["run"], "Missing argument"),
        (["rnu"], "No such command"),
        (["run", "--foo"], "No such option"),
        ([], "Missing command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], micro_experiment: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    filled = [argument.format(experiment=micro_experiment, folder=tmp_path) for argument in arguments]
    code, out, err = command(
        capsys, *filled, *(["--out", tmp_path / "out"] if filled[:1] == ["run"] and filled[1:] else [])
    )
    assert code == 2 and expected in err and is_one_line(err) and out == ""
    assert not (tmp_path / "out").exists()


def test_run_prints_the_final_table_as_it_is(
    capsys: pytest.CaptureFixture[str], micro_experiment: Path, tmp_path: Path, instead: dict[str, Any]
) -> None:
    code, out, err = command(capsys, "run", micro_experiment, "seed=3", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert f"[{len(NAMES)}/{len(NAMES)}] report: run" in out and "table of [bold]out" in out
    code, out, _ = command(capsys, "run", micro_experiment, "seed=3", "--out", tmp_path / "out", "--until", "reward")
    assert code == 0 and "done already" in out and "table of" not in out


def test_run_writes_to_runs_and_the_experiments_name(
    capsys: pytest.CaptureFixture[str],
    micro_experiment: Path,
    tmp_path: Path,
    instead: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(capsys, "run", micro_experiment)[0] == 0
    assert (tmp_path / "runs" / "probe" / "status.json").exists()


def test_tensorboard_is_passed_on(
    capsys: pytest.CaptureFixture[str], micro_experiment: Path, tmp_path: Path, instead: dict[str, Any]
) -> None:
    def logs(run: Run) -> dict[str, Any]:
        with run.metrics("sft", 0) as metrics:
            metrics.log(1, {"loss": 0.5})
        return {}

    instead["sft"] = logs
    command(capsys, "run", micro_experiment, "--out", tmp_path / "plain")
    command(capsys, "run", micro_experiment, "--out", tmp_path / "both", "--tensorboard")
    lines = [(tmp_path / out / "sft" / "metrics.jsonl").read_bytes() for out in ("plain", "both")]
    assert lines[0] == lines[1] == b'{"step": 1, "loss": 0.5}\n'
    assert list((tmp_path / "both" / "tensorboard" / "sft").iterdir())
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_a_stages_bad_input_and_divergence_have_their_codes(
    capsys: pytest.CaptureFixture[str], micro_experiment: Path, tmp_path: Path, instead: dict[str, Any]
) -> None:
    instead["sft"] = raises(InputError("sft/checkpoints: has other\nshapes"))
    code, _, err = command(capsys, "run", micro_experiment, "--out", tmp_path / "out")
    assert code == 2 and err == "almost-jax: sft/checkpoints: has other shapes\n"
    instead["sft"] = raises(TrainingDiverged("sft: diverged at step 3"))
    code, _, err = command(capsys, "run", micro_experiment, "--out", tmp_path / "out")
    assert code == 1 and err == "almost-jax: sft: diverged at step 3\n"


def test_an_error_of_ours_keeps_its_traceback(micro_experiment: Path, tmp_path: Path, instead: dict[str, Any]) -> None:
    instead["sft"] = raises(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", str(micro_experiment), "--out", str(tmp_path / "out")])


def test_status_shows_every_state(
    capsys: pytest.CaptureFixture[str], micro_experiment: Path, tmp_path: Path, instead: dict[str, Any]
) -> None:
    instead["comparisons"] = raises(InputError("as_is_reward: is [red]gone"))
    command(capsys, "run", micro_experiment, "--out", tmp_path / "out")
    code, out, _ = command(capsys, "status", tmp_path / "out")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and list(rows)[1:] == NAMES
    assert "done" in rows["responses"] and "pending" in rows["report"]
    assert "failed" in rows["comparisons"] and "[red]gone" in out.replace("\n", "")
    instead["comparisons"] = raises(KeyboardInterrupt())
    assert command(capsys, "run", micro_experiment, "--out", tmp_path / "out")[0] == 130
    _, out, _ = command(capsys, "status", tmp_path / "out")
    assert "interrupted" in out
    command(capsys, "run", micro_experiment, "--out", tmp_path / "out", "queries.count=9", "--until", "queries")
    _, out, _ = command(capsys, "status", tmp_path / "out")
    assert "upstream queries is stale" in out


def test_sweep_runs_every_point_and_writes_one_table(
    capsys: pytest.CaptureFixture[str],
    micro_experiment: Path,
    tmp_path: Path,
    instead: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables: list[tuple[Path, list[tuple[str, Path]]]] = []

    def write_sweep(directory: Path, points: list[tuple[str, Path]]) -> str:
        tables.append((directory, points))
        return "the [i]table"

    monkeypatch.setattr(sweep, "write_sweep", write_sweep)
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"base: {micro_experiment.name}\nname: three\nsweep: {{grid: {{seed: [0, 1, 2]}}}}\n")
    out = tmp_path / "out"
    code, printed, _ = command(capsys, "sweep", grid, "--out", out)
    assert code == 0 and "the [i]table" in printed and "point 3/3: seed-2" in printed
    assert tables == [(out, [(f"seed-{seed}", out / f"seed-{seed}") for seed in range(3)])]
    assert all((out / f"seed-{seed}" / "status.json").exists() for seed in range(3))

    def diverges(run: Run) -> dict[str, Any]:
        if run.config.seed == 1:
            raise TrainingDiverged("rlsf: diverged")
        return {}

    instead["rlsf"] = diverges
    code, _, err = command(capsys, "sweep", grid, "--out", tmp_path / "other", "ppo.kl_coef=0.2")
    assert code == 1 and "point seed-1: rlsf: diverged" in err
    assert [label for label, _ in tables[-1][1]] == ["seed-0", "seed-2"]


def test_ctrl_c_says_how_to_go_on(micro_experiment: Path, tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, dataclasses\n"
        # A shell's background job, as the tests may be, has it ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from almost_jax import cli, pipeline\n"
        "def wait(run):\n    print('waiting', flush=True)\n    time.sleep(600)\n"
        "pipeline.STAGES = (dataclasses.replace(pipeline.STAGES[0], run=wait),)\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["run", str(micro_experiment), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "almost-jax: interrupted; nothing finished is lost, the same command goes on from here\n"
    assert json.loads((tmp_path / "out" / "status.json").read_text())["stages"]["queries"]["state"] == "running"
    assert (tmp_path / "cache" / "almost_jax" / "jax").is_dir()


@pytest.mark.slow
def test_the_smoke_experiment_runs_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    # One device, as the demo has, not the eight of the tests.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    line = [sys.executable, "-m", "almost_jax", "run", str(ROOT / "experiments" / "microworld_smoke.yaml")]
    first = subprocess.run([*line, "--out", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr
    gold = json.loads((tmp_path / "evaluation" / "gold.json").read_text())
    assert list(gold["configurations"]) == ["A", "B", "C", "D", "E"]
    assert set(gold["policies"]) == {"prompted", "sft_self_play", "sft", "rlsf"}
    for output in ("report.md", "report.html", "rlsf/metrics.jsonl", "comparisons.jsonl"):
        assert (tmp_path / output).stat().st_size > 0
    assert page.summary_table(tmp_path) in first.stdout
    second = subprocess.run([*line, "--out", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert second.returncode == 0 and second.stdout.count("done already") == len(NAMES)


def test_a_process_that_sigterm_broke_off_does_not_wait_for_threads_but_for_a_checkpoint(tmp_path: Path) -> None:
    """As where a library was broken off that holds a lock, for which a thread waits that Python waits for."""
    code = (
        "import concurrent.futures, pathlib, sys, threading, time\n"
        "from almost_jax import cli\n"
        "from almost_jax.io import preemption\n"
        "def commit():\n"
        "    time.sleep(2)\n"
        "    pathlib.Path(sys.argv[1]).write_text('whole')\n"
        "def command(**_):\n"
        "    lock = threading.Lock()\n"
        "    lock.acquire()\n"
        "    concurrent.futures.ThreadPoolExecutor(1).submit(lock.acquire)\n"
        "    with preemption.stops_on_sigterm():\n"
        "        threading.Thread(target=commit, name=preemption.COMMIT).start()\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "cli.application = lambda name: command\n"
        "cli.main(['run'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "checkpoint")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert (tmp_path / "checkpoint").read_text() == "whole"
