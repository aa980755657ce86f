"""The training steps that are compared, and the numbers that every engine is given.

`sft`: cross-entropy on all tokens of 4 rows of 256. `reward`: the pairwise ranking loss of 4 pairs of 256 tokens,
scores read at the last one. Both: AdamW behind global-norm clipping, the same rows in every step, so that
losses can be compared step by step. `ppo`: one whole iteration, 16 prompts of 64 tokens and 64 new ones, ends ignored,
at temperature 1: rollout, log-probs of policy and reference, values, scores, advantages, then 2 epochs of one update of
policy and critic, in micro-batches of a quarter.
"""

import dataclasses

import numpy as np

LEARNING_RATE = 1e-5
B1, B2, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 0.9, 0.999, 1e-8, 0.01, 1.0
HEAD_STDDEV = 0.02
TASKS = ("sft", "reward", "ppo")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and tokens of the supervised steps, and of PPO."""

    rows: int
    tokens: int
    steps: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    epochs: int

    @property
    def micro_batches(self) -> int:
        """Into how many parts a PPO update is split by everyone: it needs less memory and no more time."""
        return 4


def sizes(quick: bool) -> Sizes:
    """The sizes above; half as many rows when quick."""
    return Sizes(2, 256, 2, 8, 64, 32, 2) if quick else Sizes(4, 256, 3, 16, 64, 64, 2)


def windows(text: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Rows of a text that begin at different places: [rows, length] int32."""
    starts = (len(text) // rows) * np.arange(rows)
    return text[(starts[:, None] + np.arange(length)[None, :]) % len(text)].astype(np.int32)


def head(hidden_size: int) -> np.ndarray:
    """The scalar head that every engine starts from: [hidden_size] float32."""
    return (np.random.default_rng(7).standard_normal(hidden_size) * HEAD_STDDEV).astype(np.float32)
