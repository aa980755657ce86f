"""How far long work is: a live bar on a terminal, else a line now and then, both with rate and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from almost_jax.io.distributed import is_primary
from almost_jax.io.preemption import stop_between

# (description, done, total): called as a stage advances, for status.json.
ProgressHook = Callable[[str, int, int], None]

# A log file gets a line this often; a terminal has a live bar instead.
SECONDS_BETWEEN_LINES = 10.0


class ProgressReport:
    """Counts what is done and shows it with rate, time left and the newest figures.

    Use through `console_progress` or `Run.progress`.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        total: int,
        done: int,
        bar: Progress | None,
        hook: ProgressHook | None,
        at_once: bool,
    ) -> None:
        self._console = console
        self._description = description
        self._total = total
        self._done = done
        self._resumed_at = self._shown = done
        self._advances = 0
        self._started = self._last_line = time.monotonic()
        self._figures = ""
        self._hook = hook
        self._bar = bar
        self._task = (
            None if bar is None else bar.add_task(description, total=total, completed=done, rate="", figures="")
        )
        # Whether a line was printed, so that a last one belongs behind it.
        self._said = False
        if bar is None and at_once:
            self._print_line()

    def advance(self, n: int = 1, **figures: float) -> None:
        """Count `n` more as done; `figures` are shown beside the bar until the next ones come."""
        self._done += n
        self._advances += 1
        if figures:
            self._figures = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        stop_between()
        if self._hook is not None:
            self._hook(self._description, self._done, self._total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(), figures=self._figures)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def finish(self) -> None:
        """Show the last state; what a stage skipped at the end stays visible as a bar that is not full."""
        if self._said and self._done > self._shown:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line, self._shown, self._said = time.monotonic(), self._done, True
        self._console.print(self._line(), markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _per_second(self) -> float:
        elapsed = time.monotonic() - self._started
        return (self._done - self._resumed_at) / elapsed if elapsed > 0 else 0.0

    def _rate(self) -> str:
        rate = self._per_second()
        return f"{rate:.1f}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s each"

    def _line(self) -> str:
        parts = [f"{self._description}: {self._done}/{self._total}"]
        left = (self._total - self._done) / max(self._per_second(), 1e-9)
        if self._done >= self._total > self._resumed_at:
            parts += [self._rate(), f"in {_duration(time.monotonic() - self._started)}"]
        elif self._advances > 1:
            # Not after the first step, which holds the compilation for all the others: no rate to go by.
            parts += [self._rate(), f"{_duration(left)} left"]
        return "  ".join([*parts, self._figures]).rstrip()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# (description, total, done) -> what counts on: `stderr_progress` or a run's `progress`.
ShowProgress = Callable[[str, int, int], AbstractContextManager[ProgressReport]]


@contextmanager
def console_progress(
    console: Console,
    description: str,
    total: int,
    done: int = 0,
    hook: ProgressHook | None = None,
    at_once: bool = True,
) -> Iterator[ProgressReport]:
    """Show `done` of `total` growing: a live bar on a terminal, else a line every ten seconds.

    Without `at_once` the first of those lines comes after ten seconds, and none if all is done by then.

    Yields:
        An object whose `.advance(n=1, **figures)` counts n more and shows the figures.
    """
    if not console.is_terminal:
        report = ProgressReport(console, description, total, done, None, hook, at_once)
        yield report
        report.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressReport(console, description, total, done, bar, hook, at_once)


def stderr_progress(description: str, total: int, done: int = 0) -> AbstractContextManager[ProgressReport]:
    """`console_progress` on standard error, where a command's progress goes; a short one says nothing in a log."""
    return console_progress(Console(stderr=True, quiet=not is_primary()), description, total, done, at_once=False)
