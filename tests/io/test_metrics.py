"""metrics.jsonl has the same bytes after any interruption."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.errors import InputError
from almost_jax.io.metrics import MetricsLogger


def run(path: Path, first: int, last: int, resume_step: int):
    with MetricsLogger(path, resume_step, None) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"loss": jnp.float32(1 / (step + 3)), "kl": np.float32(0.1) * step, "n": step})


def test_28_metrics_resume_to_the_same_bytes(tmp_path: Path):
    whole = tmp_path / "whole.jsonl"
    run(whole, 1, 7, 0)
    data = whole.read_bytes()
    path = tmp_path / "a" / "metrics.jsonl"
    ends = [place for place, byte in enumerate(data) if byte == 10]
    for cut in sorted({0, *ends, *(end + 1 for end in ends), *range(3, len(data), 23)}):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data[:cut])
        logged = data[:cut].count(b"\n")
        checkpoint = logged - logged % 3
        run(path, checkpoint + 1, 7, checkpoint)
        assert path.read_bytes() == data


def test_lines_hold_exact_numbers_and_no_clock(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLogger(path, 0, None) as logger:
        logger.log(3, {"b": 0.1, "a": float("nan"), "c": float("-inf")})
        assert path.read_text() == '{"step": 3, "b": 0.1, "a": null, "c": null}\n'
    logger.close()


def test_a_fresh_start_drops_what_an_old_run_left(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    run(path, 1, 5, 0)
    run(path, 1, 2, 0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_foreign_file_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2.0}\n')
    with pytest.raises(InputError, match="line 2"):
        MetricsLogger(path, 0, None)
    assert path.read_text() == '{"step": 1}\n{"loss": 2.0}\n'


def test_tensorboard_events_are_written(tmp_path: Path):
    with MetricsLogger(tmp_path / "metrics.jsonl", 0, tmp_path / "tensorboard") as logger:
        logger.log(1, {"loss": 0.5})
    assert [path.stat().st_size > 0 for path in (tmp_path / "tensorboard").iterdir()] == [True]
