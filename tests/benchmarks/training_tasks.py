"""The training steps that are compared, and the numbers that every engine is given.

`sft`: cross-entropy on all tokens of 4 rows of 256. `reward`: the pairwise ranking loss of 4 pairs of 256 tokens,
scores read at the last one. `pairs`: the same loss of eight pairs of dialogues of up to 256 tokens that begin alike
(`PAIRS`), drawn anew for each of `DRAWS` steps, of which the mean of the first `TIMED` is given: ours packs them, torch
pads each batch to its longest, Tunix, which compiles a program for each shape, all alike. The others have the same rows
in every step, and the median is given. All: AdamW behind global-norm clipping. `ppo`: one whole iteration, 16 prompts
of 64 tokens and 64 new ones, ends ignored, at temperature 1: rollout, log-probs of policy and reference, values,
scores, advantages, then 2 epochs of one update of policy and critic, in micro-batches of a quarter.
"""

import dataclasses

import numpy as np

LEARNING_RATE = 1e-5
B1, B2, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = 0.9, 0.999, 1e-8, 0.01, 1.0
HEAD_STDDEV = 0.02
TASKS = ("sft", "reward", "pairs", "ppo")
# Tokens that both texts of a pair begin with, and those of the chosen and the rejected one alone: the middle pair of
# each eighth, by tokens with the beginning counted once, of 314 that have up to 256 tokens a text by SmolLM2's
# tokenizer, among 400 of Anthropic's harmless set (Bai et al. 2022).
PAIRS = (
    (20, 34, 3), (44, 10, 30), (17, 22, 73), (17, 88, 32), (118, 8, 37), (175, 6, 10), (70, 85, 63), (218, 29, 17)
)  # fmt: skip
# Of the rows that ours packs them into, which are as long as the longest pair if that is more.
PACKED_LENGTH = 256
# Steps that ours makes by one call of a program in `sft` and `reward`, and how many such calls are timed.
STEPS_PER_CALL, CALLS = 4, 2
# Steps of a stage, and of them the timed ones, behind one that compiles.
DRAWS, TIMED = 200, 10


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


def drawn(step: int, size: Sizes) -> list[int]:
    """Which of `PAIRS` a step of `pairs` learns from; the first from each."""
    count = 2 * size.rows
    if step == 0:
        return list(range(0, len(PAIRS), len(PAIRS) // count))
    return np.random.default_rng(step).integers(len(PAIRS), size=count).tolist()


def rewarded(task: str, text: np.ndarray, size: Sizes, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The texts of a reward model step: rows [2B, T] int32, padded on the right by 0, and lengths [2B] int32.

    The first half is preferred to the second.
    """
    if task == "reward":
        return windows(text, 2 * size.rows, size.tokens), np.full(2 * size.rows, size.tokens, np.int32)
    pairs = [PAIRS[place] for place in drawn(step, size)]
    sources = windows(text, 3 * len(pairs), size.tokens).reshape(3, len(pairs), size.tokens)
    texts = [
        np.concatenate([sources[0, place, : pair[0]], sources[side, place, : pair[side]]])
        for side in (1, 2)
        for place, pair in enumerate(pairs)
    ]
    lengths = np.array([len(text) for text in texts], np.int32)
    return np.stack([np.pad(text, (0, lengths.max() - len(text))) for text in texts]), lengths


def head(hidden_size: int) -> np.ndarray:
    """The scalar head that every engine starts from: [hidden_size] float32."""
    return (np.random.default_rng(7).standard_normal(hidden_size) * HEAD_STDDEV).astype(np.float32)
