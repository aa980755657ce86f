"""launch/local.sh: processes told apart by their environment, stopped together."""

import shlex
import subprocess
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch/local.sh"


def local(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(LOCAL), *arguments], capture_output=True, text=True, timeout=300)


SHOW = 'c=$ALMOST_COORDINATOR; echo "$ALMOST_PROCESS_ID of $ALMOST_NUM_PROCESSES by ${c%:*}:" $((${c##*:} > 0))'


def test_each_process_is_told_its_place() -> None:
    finished = local("3", "bash", "-c", SHOW)
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.splitlines()) == [f"[{i}] {i} of 3 by 127.0.0.1: 1" for i in range(3)]


def test_one_failure_stops_all_even_those_that_ignore_the_signal() -> None:
    started = time.monotonic()
    # The others end by themselves only long after.
    finished = local("3", "bash", "-c", "trap '' TERM; [[ $ALMOST_PROCESS_ID == 1 ]] && exit 7; exec sleep 600")
    assert finished.returncode == 7
    assert finished.stderr == "local.sh: process 1 ended with exit code 7; the others are stopped\n"
    assert time.monotonic() - started < 300


def test_a_dry_run_prints_the_commands_and_starts_none(tmp_path: Path) -> None:
    finished = local("--dry-run", "2", "touch", str(tmp_path / "a file"))
    lines = [shlex.split(line) for line in finished.stdout.splitlines()]
    assert [line[2:] for line in lines] == [
        [f"ALMOST_PROCESS_ID={i}", "ALMOST_NUM_PROCESSES=2", "touch", str(tmp_path / "a file")] for i in range(2)
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"], ["2", "no-such-command"]])
def test_bad_input_is_one_line_and_exit_2(arguments: list[str]) -> None:
    finished = local(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("local.sh: ") and finished.stderr.count("\n") == 1
