"""What sampling did and how fast: counts that an engine adds to."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Protocol


class _Compiles(Protocol):
    compiled: int
    compile_seconds: float


@dataclasses.dataclass
class Stats:
    """Counts of one or more runs of an engine.

    prefill_tokens: read by prefill programs, without padding. prefill_tokens_asked: what they would be if every
    request's prefix and prompt were read for it alone. prefill_tokens_reused: of them those that a parent's cache held.
    slot_steps, used_steps: tokens that the slots could have drawn in the steps that ran, and those of completions.
    programs: of different shapes that were compiled, or read from disk. seconds: spent sampling, without compilation,
    with what the caller does with completions as long as the device goes on meanwhile.
    """

    requests: int = 0
    new_tokens: int = 0
    prefill_tokens: int = 0
    prefill_tokens_asked: int = 0
    prefill_tokens_reused: int = 0
    slot_steps: int = 0
    used_steps: int = 0
    programs: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    _started: float = 0.0

    @contextlib.contextmanager
    def measured(self, programs: _Compiles) -> Iterator[None]:
        """Count the time until the end as sampling, less what `programs` compile in it."""
        before, count = programs.compile_seconds, programs.compiled
        self._started = time.perf_counter()
        try:
            yield
        finally:
            compiled = programs.compile_seconds - before
            self.seconds += time.perf_counter() - self._started - compiled
            self.compile_seconds += compiled
            self.programs += programs.compiled - count

    def rate(self) -> float:
        """New tokens a second so far, compilation included; within `measured`."""
        return self.new_tokens / max(self.seconds + time.perf_counter() - self._started, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within `measured`: don't count the time until the end."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def line(self) -> str:
        """The same for people, in one line."""
        said = self.report()
        return (
            f"{said['requests']} requests, {said['new_tokens']} tokens, {said['tokens_per_second']:.0f} tokens/s, "
            f"slots {said['slot_utilisation']:.0%} used, {said['prefill_tokens']} tokens of prompts read and "
            f"{said['prefill_tokens_saved']} saved, {said['programs']} programs in {said['compile_seconds']:.1f} s"
        )

    def report(self) -> dict[str, Any]:
        """The figures that `almost-jax generate` prints."""
        return {
            "requests": self.requests,
            "new_tokens": self.new_tokens,
            "prefill_tokens": self.prefill_tokens,
            "prefill_tokens_saved": self.prefill_tokens_asked - self.prefill_tokens,
            "programs": self.programs,
            "compile_seconds": round(self.compile_seconds, 3),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.new_tokens / self.seconds, 2) if self.seconds > 0 else 0.0,
            "slot_utilisation": round(self.used_steps / self.slot_steps, 4) if self.slot_steps else 1.0,
        }
