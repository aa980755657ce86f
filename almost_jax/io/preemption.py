"""SIGTERM, as a preempted machine gets it: training saves its state first, everything else stops at once, exit 0."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax


class Preempted(SystemExit):
    """The run was asked to stop and has saved what it had; the process ends with code 0."""

    def __init__(self) -> None:
        """Code 0: a scheduler must not take this for a failure."""
        super().__init__(0)


class _Signals:
    """Whether SIGTERM came, and whether someone has promised to look."""

    asked = False
    watchers = 0


@contextlib.contextmanager
def stops_on_sigterm() -> Iterator[None]:
    """Within the context SIGTERM raises `Preempted`, at once or, inside `saves_first`, when the loop next looks.

    Does nothing outside the main thread, which alone may set handlers, and nothing where several processes share a
    run: they would stop at different steps, and a save needs them all. Those go on from their last checkpoint.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # The second signal is meant: whoever sends it won't wait for a checkpoint.
        again, _Signals.asked = _Signals.asked, True
        if again or not _Signals.watchers:
            raise Preempted

    _Signals.asked = False
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _Signals.asked = False


@contextlib.contextmanager
def saves_first() -> Iterator[None]:
    """Within the context SIGTERM only makes `asked_to_stop` true; the loop saves and then raises `Preempted`."""
    _Signals.watchers += 1
    try:
        yield
    finally:
        _Signals.watchers -= 1
    if _Signals.asked and not _Signals.watchers:
        raise Preempted


def asked_to_stop() -> bool:
    """Whether SIGTERM has come since the outermost context began."""
    return _Signals.asked
