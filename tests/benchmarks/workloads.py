"""The sampling workloads, and the token ids that every engine gets.

Prompts are windows of this repository's LICENSE: natural text that never changes. Windows of different requests begin
at different tokens, so nothing is shared that isn't meant to be. All prompts of a workload are equally long, so that no
engine pays for padding.
"""

import dataclasses
import math

import numpy as np

# The request lengths of `ragged` are spread evenly on a logarithmic scale between these.
SHORTEST, LONGEST = 16, 256


@dataclasses.dataclass(frozen=True)
class Workload:
    """So many requests of `shared + own` prompt tokens, each continued by its own limit, whatever token comes.

    `samples` continuations are drawn for each request. `temperature` 0 is greedy. `slots` rows run at a time.
    """

    name: str
    requests: int
    shared: int
    own: int
    limits: tuple[int, ...]
    samples: int
    temperature: float
    slots: int

    @property
    def new_tokens(self) -> int:
        """Tokens that are asked for."""
        return self.samples * sum(self.limits)


def spread(requests: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths between two bounds, log-uniform, in a shuffled order that is always the same."""
    steps = np.linspace(math.log(shortest), math.log(longest), requests)
    lengths = np.rint(np.exp(steps)).astype(int)
    return tuple(np.random.default_rng(0).permutation(lengths).tolist())


def sampling_workloads(quick: bool) -> dict[str, Workload]:
    """The four workloads by name, smaller ones when quick."""
    if quick:
        found = [
            Workload("shared_prefix", 16, 512, 32, (32,) * 16, 1, 0.0, 16),
            Workload("separate", 8, 0, 256, (48,) * 8, 1, 0.0, 8),
            Workload("ragged", 32, 0, 64, spread(32, 8, 128), 1, 0.0, 8),
            Workload("best_of_4", 8, 0, 256, (32,) * 8, 4, 1.0, 32),
        ]
    else:
        found = [
            Workload("shared_prefix", 16, 1024, 32, (64,) * 16, 1, 0.0, 16),
            Workload("separate", 8, 0, 256, (128,) * 8, 1, 0.0, 8),
            Workload("ragged", 64, 0, 64, spread(64, SHORTEST, LONGEST), 1, 0.0, 16),
            Workload("best_of_4", 16, 0, 256, (64,) * 16, 4, 1.0, 64),
        ]
    return {workload.name: workload for workload in found}


def prompts(workload: Workload, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A workload's prompts.

    Args:
        workload: which.
        text: [n] int, the tokens of a long text; read round and round.

    Returns:
        The shared tokens [shared] and every request's own [requests, own], int32.
    """
    stride = max((len(text) - workload.shared) // workload.requests, 1)
    starts = workload.shared + stride * np.arange(workload.requests)
    own = text[(starts[:, None] + np.arange(workload.own)[None, :]) % len(text)]
    return text[: workload.shared].astype(np.int32), own.astype(np.int32)


def whole_prompts(workload: Workload, text: np.ndarray) -> np.ndarray:
    """The same with the shared tokens in front of everyone's own: [requests, shared + own] int32."""
    shared, own = prompts(workload, text)
    return np.concatenate([np.broadcast_to(shared, (workload.requests, len(shared))), own], axis=1)
