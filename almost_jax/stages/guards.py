"""Guards: what a training stage does about a step that went wrong, by the actions of its `guards:` section.

`stop` ends the stage by one line that says where and why and names the last good checkpoint; `skip` leaves the step's
updates out, with a line, and stops after too many skipped in a row; `off` looks away. Every training stage shares this.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from almost_jax.config import PpoConfig
from almost_jax.errors import TrainingDiverged
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.run import Run

# The keys, in a checkpoint's JSON, of how many steps were skipped before it: in a row, in all, and in a row with none
# of their updates made.
SKIPPED, SKIPPED_SO_FAR, UNCHANGED = "skipped_in_a_row", "skipped", "unchanged"
# Limits, and the guards that they belong to.
_LIMITS = {"max_kl": "kl", "min_entropy": "entropy"}
# Figures of rollouts that are the policy's own: a bad one says that the policy went astray before it drew them.
OF_THE_POLICY = ("kl", "rollout_entropy")


class Problem(NamedTuple):
    """What is wrong with a step."""

    action: str  # "stop", "skip" or "off".
    why: str  # A clause for the message.
    of_policy: bool = False  # The policy that drew the step's rollouts is at fault, not what the step does with them.


class Guard:
    """Acts on problems and counts the steps skipped in a row, for one stage."""

    def __init__(self, run: Run, name: str, checkpoints: Checkpoints, max_skips: int, extra: Mapping[str, Any]) -> None:
        """Start, or go on from a checkpoint.

        Args:
            run: told of every skipped step.
            name: the stage, for messages.
            checkpoints: where the last good state is.
            max_skips: so many skipped in a row are borne; the next one stops.
            extra: the JSON of the checkpoint that training goes on from.
        """
        self._run, self._name, self._checkpoints, self._max_skips = run, name, checkpoints, max_skips
        self._skipped = int(extra.get(SKIPPED, 0))
        self._skipped_so_far = int(extra.get(SKIPPED_SO_FAR, 0))
        self._unchanged = int(extra.get(UNCHANGED, 0))

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run counts on."""
        found = {SKIPPED: self._skipped, SKIPPED_SO_FAR: self._skipped_so_far, UNCHANGED: self._unchanged}
        return {key: count for key, count in found.items() if count}

    def say_what_was_skipped(self, steps: int) -> None:
        """Say at the stage's end how many of its steps were left out, if any."""
        if self._skipped_so_far:
            self._run.say(f"{self._name}: {self._skipped_so_far} of {steps} steps were skipped")

    def skips(self, step: int, problems: Iterable[Problem], drawn_by: int | None = None) -> bool:
        """Act on what is wrong with a step: whether its updates are to be left out, or were.

        Call it once a step, with no problems when all is well.

        Args:
            step: counted from 1.
            problems: what was found.
            drawn_by: the step whose policy drew this step's rollouts, of which nothing was learned yet; None once
                something was, or where no policy draws any.

        Raises:
            TrainingDiverged: a problem's action is `stop`, or too many steps in a row were skipped.
        """
        acted = [problem for problem in problems if problem.action != "off"]
        if not acted:
            self._skipped = self._unchanged = 0
            return False
        last_good = self._last_good(step, drawn_by if any(problem.of_policy for problem in acted) else None)
        stopping, skipping = ([one.why for one in acted if one.action == kind] for kind in ("stop", "skip"))
        if stopping:
            raise self._diverged(step, ", ".join(stopping), last_good)
        self._skipped += 1
        self._skipped_so_far += 1
        # Of a step's updates that were begun, only the bad ones are left out.
        self._unchanged = 0 if drawn_by is None else self._unchanged + 1
        why = ", ".join(skipping)
        if self._skipped > self._max_skips:
            skipped = f"{self._max_skips} steps in a row were skipped before it (max_skips)"
            raise self._diverged(step, f"{why}; {skipped}", last_good)
        self._run.say(f"{self._name}: skipped step {step}: {why}; {last_good}")
        return True

    def _diverged(self, step: int, why: str, last_good: str) -> TrainingDiverged:
        return TrainingDiverged(f"{self._name}: diverged at step {step}: {why}; {last_good}")

    def _last_good(self, step: int, astray: int | None) -> str:
        """Names the last checkpoint, or the last one before the policy of step `astray` came to be."""
        steps = self._checkpoints.steps()
        if astray is not None:
            # Steps that were skipped as a whole left the policy as it was; one that came after it says nothing of it.
            unchanged = max(self._unchanged - (step - 1 - astray), 0)
            steps = [saved for saved in steps if saved < astray - unchanged]
        return f"the last good checkpoint is step {max(steps)}" if steps else "there is no good checkpoint before it"


def non_finite(figures: Mapping[str, float], action: str) -> list[Problem]:
    """A problem that names every figure that is NaN or infinite, or none."""
    bad = {key: value for key, value in figures.items() if not math.isfinite(value)}
    why = ", ".join(f"{key} is {value}" for key, value in bad.items())
    return [Problem(action, why, any(key in bad for key in OF_THE_POLICY))] if bad else []


def rollout_problems(figures: Mapping[str, float], ppo: PpoConfig) -> list[Problem]:
    """What is wrong with a step's rollouts, before anything is learned from them.

    Args:
        figures: of `rollouts.experience`, on the host, and `at_limit`, the share of responses cut at `max_new_tokens`.
        ppo: its guards.
    """
    guards = ppo.guards
    found = non_finite(figures, guards.non_finite)
    # Comparisons with a figure that isn't finite are left to the line above: NaN is neither too large nor too small.
    if figures.get("kl", 0.0) > guards.max_kl:
        why = f"kl {figures['kl']:.4g} is above ppo.guards.max_kl {guards.max_kl:g}"
        found.append(Problem(guards.kl, why, of_policy=True))
    if (entropy := figures["rollout_entropy"]) < guards.min_entropy:
        why = f"entropy {entropy:.4g} is below ppo.guards.min_entropy {guards.min_entropy:g}"
        found.append(Problem(guards.entropy, why, of_policy=True))
    if figures["at_limit"] >= 1.0:
        why = f"all responses were cut at ppo.sampling.max_new_tokens {ppo.sampling.max_new_tokens}"
        found.append(Problem(guards.length, why, of_policy=True))
    return found


def update_problems(every: Sequence[Mapping[str, float]], ppo: PpoConfig) -> list[Problem]:
    """What is wrong with a step's updates: the figures of each that aren't finite.

    Args:
        every: the figures of each update, on the host.
        ppo: its guards.
    """
    found = []
    for number, figures in enumerate(every, start=1):
        for problem in non_finite(figures, ppo.guards.non_finite):
            # A policy that is finite drew the rollouts: whatever went wrong, it went wrong in this step.
            found.append(Problem(problem.action, f"{problem.why} in update {number} of {len(every)}"))
    return found


def consequential(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, without those of guards that leave no trace in what a stage makes.

    One that stops a stage has done nothing to a stage that got to its end, whatever its limit, and one that is off does
    nothing at all.
    """

    def counts(key: str) -> bool:
        section, _, name = key.rpartition(".")
        if not section.endswith(".guards"):
            return True
        if name == "max_skips":
            return any(value == "skip" for other, value in values.items() if other.startswith(f"{section}."))
        return bool(values[f"{section}.{_LIMITS.get(name, name)}"] == "skip")

    return {key: value for key, value in values.items() if counts(key)}


def loosened(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether all that changed are guards, and what they let through so far they would let through now.

    A stage that such a guard has stopped may go on. Up to rounding, and the figure `skipped` that earlier lines of its
    metrics lack, it ends as if the guards had been like this from the start.

    Args:
        before: values by dotted key, as the stage has read them so far.
        now: as it would read them.
    """
    changed = [key for key in {**before, **now} if key not in before or key not in now or before[key] != now[key]]
    return bool(changed) and all(_loosened(key, before, now) for key in changed)


def _loosened(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    section, _, name = key.rpartition(".")
    if not section.endswith(".guards") or key not in before or key not in now:
        return False
    # Steps that were skipped by a limit might not be by another.
    if name == "max_kl":
        return bool(now[key] >= before[key] and before.get(f"{section}.kl") == "stop")
    if name == "min_entropy":
        return bool(now[key] <= before[key] and before.get(f"{section}.entropy") == "stop")
    if name == "max_skips":
        return bool(now[key] >= before[key])
    return bool(before[key] == "stop")


def acts(problems: Iterable[Problem]) -> bool:
    """Whether any of the problems is acted on."""
    return any(problem.action != "off" for problem in problems)


def figures_of(steps: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> list[dict[str, float]]:
    """The figures of each of some steps on the host, from a mapping of scalars for each or one of arrays [K]."""
    if isinstance(steps, Mapping):
        whole = {key: np.asarray(value) for key, value in jax.device_get(dict(steps)).items()}
        return [dict(zip(whole, map(float, values), strict=True)) for values in zip(*whole.values(), strict=True)]
    return [fetched(own) for own in steps]


def fetched(figures: Mapping[str, Any]) -> dict[str, float]:
    """Scalars from the device as Python floats."""
    return {key: float(np.asarray(value)) for key, value in jax.device_get(dict(figures)).items()}
