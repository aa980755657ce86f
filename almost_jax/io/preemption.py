"""SIGTERM, as a preempted machine gets it: training saves its state first, everything else stops at once, exit 0."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from jax.experimental import multihost_utils

from almost_jax.io.distributed import several, together


class Preempted(SystemExit):
    """The run was asked to stop and has saved what it had; the process ends with code 0."""

    def __init__(self) -> None:
        """Code 0: a scheduler must not take this for a failure."""
        super().__init__(0)

    def __reduce__(self) -> tuple[type["Preempted"], tuple[()]]:
        return Preempted, ()


# The name of threads that a process which leaves at once waits for all the same.
COMMIT = "commit of a checkpoint"


class _Signals:
    """Whether SIGTERM came, whether it broke something off, who has promised to look, and how often they looked."""

    asked = False
    broke_off = False
    watchers = 0
    looks = 0


@contextlib.contextmanager
def stops_on_sigterm() -> Iterator[None]:
    """Within the context SIGTERM raises `Preempted`, at once or, inside `saves_first`, when the loop next looks.

    Does nothing outside the main thread, which alone may set handlers. Where several processes share a run, they stop
    at the same point, all of them, though only one got the signal: jax.distributed catches it and has them agree, and
    they look at every step of every stage (`asked_to_stop`, `stop_between`).
    """
    if threading.current_thread() is not threading.main_thread() or several():
        _Signals.asked = False
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # The second signal is meant: whoever sends it won't wait for a checkpoint.
        again, _Signals.asked = _Signals.asked, True
        if again or not _Signals.watchers:
            _Signals.broke_off = True
            raise Preempted

    _Signals.asked = False
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _Signals.asked = False


def broke_off() -> bool:
    """Whether SIGTERM has broken off whatever was being done, rather than ended a loop between two steps."""
    return _Signals.broke_off


def leave(code: int) -> NoReturn:
    """End the process without what Python does at its end, but for checkpoints that are being committed.

    A library that was broken off in the middle may hold a lock for ever, for which one of its threads waits, and Python
    for that thread.
    """
    for thread in threading.enumerate():
        if thread.name == COMMIT:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    """Whether SIGTERM has come since the outermost context began; the same answer on every process."""
    if together() and not _Signals.asked:
        # Costs no communication until one of them has got the signal.
        _Signals.looks += 1
        _Signals.asked = multihost_utils.reached_preemption_sync_point(_Signals.looks)
    return _Signals.asked


def stop_between() -> None:
    """Called where a stage may stop: stops all processes together, unless a loop has promised to save first.

    One process alone too: where the signal came while Python ran a callback that lets no exception through (of the
    garbage collector, say), what the handler raised is lost.

    Raises:
        Preempted: one of them got SIGTERM.
    """
    if not _Signals.watchers and asked_to_stop():
        raise Preempted
