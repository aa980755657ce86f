"""metrics.jsonl: one JSON line per logged step, the same bytes whether or not a run was interrupted."""

import math
import os
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError
from almost_jax.io.distributed import from_primary, is_primary
from almost_jax.io.records import dump_record, parse_partial, write_bytes


class MetricsLogger:
    """Appends figures per step to a JSON-lines file, and to TensorBoard when given a directory.

    The file holds no wall-clock times, so that a resumed run writes the same bytes; TensorBoard's events carry them.
    """

    def __init__(self, path: Path, resume_step: int, tensorboard_dir: Path | None) -> None:
        """Open; lines of steps after `resume_step`, and a torn last line, are cut off: they'll be written again.

        Args:
            path: the file; folders are made.
            resume_step: the step of the state that training goes on from (0 or less when it starts fresh).
            tensorboard_dir: where TensorBoard events go; None for no events.

        Raises:
            InputError: a line of an existing file isn't a JSON object with an integer `step`.
        """
        self.path = Path(path)

        def read() -> bytes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.read_bytes() if self.path.exists() else b""

        data = from_primary(read)
        records, size = parse_partial(data, str(self.path))
        kept = []
        self._last = 0
        for number, (line, record) in enumerate(zip(data[:size].split(b"\n"), records, strict=False), start=1):
            if not isinstance(record.get("step"), int):
                raise InputError(f"{self.path}, line {number}: expected an integer `step`, found {line[:80]!r}")
            if record["step"] <= resume_step:
                kept.append(line + b"\n")
                self._last = record["step"]
        if b"".join(kept) != data:
            write_bytes(self.path, b"".join(kept))
        # Elsewhere than on process 0 what is logged goes nowhere.
        self._file: Any = (self.path if is_primary() else Path(os.devnull)).open("ab")
        self._writer: Any = None
        if tensorboard_dir is not None and is_primary():
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard_dir), purge_step=max(resume_step, 0) + 1)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write one line: the step, then the figures in their order; a figure that isn't finite becomes null.

        Args:
            step: the step after which the figures hold.
            figures: name -> number (a Python, NumPy or 0-d JAX one).
        """
        numbers = {name: float(value) for name, value in figures.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(dump_record({"step": int(step), **line}))
        self._file.flush()
        self._last = int(step)
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, int(step))

    def sync(self) -> int:
        """Bring what was logged to the disk; the step of the last line, 0 when there is none."""
        self._file.flush()
        if is_primary():
            os.fsync(self._file.fileno())
        return self._last

    def close(self) -> None:
        """Sync and close the file and the event writer; harmless when repeated."""
        if not self._file.closed:
            self.sync()
            self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "MetricsLogger":
        """The logger itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()
