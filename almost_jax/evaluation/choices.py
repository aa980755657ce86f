"""Choices after a prompt: how likely a language model finds each, or what a reward model scores them.

Texts become tokens as in lm-evaluation-harness: prompt and choice are encoded together, with the special tokens that
the tokenizer puts around a text, and the choice is what stands behind the prompt's own tokens. Where both are too long
for the model, the prompt loses its beginning.
"""

from collections.abc import Sequence

import numpy as np

from almost_jax.core.partitioning import exact_products
from almost_jax.errors import InputError
from almost_jax.io.models import Model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.likelihood import Likelihood, continuation_likelihoods
from almost_jax.sampling.scoring import score_sequences
from almost_jax.stages.dialogues import dialogue_tokens
from almost_jax.stages.templates import Turn

# Rows are padded by them, so that a few programs serve all lengths.
MULTIPLE = 32
REWARD_MULTIPLE = 128


def encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of what follows it; spaces at the prompt's end count to what follows."""
    kept = prompt.rstrip()
    whole = tokenizer.encode_prompt(prompt + continuation)
    context = tokenizer.encode_prompt(kept)
    return context, whole[len(context) :]


def fit(context: Sequence[int], continuation: Sequence[int], positions: int) -> list[int]:
    """The end of a context that fits before its continuation, whose last token is predicted and never read."""
    room = positions + 1 - len(continuation)
    return list(context[-room:]) if room > 0 else []


def choice_likelihoods(
    model: Model, pairs: Sequence[tuple[str, str]], batch_size: int
) -> tuple[list[Likelihood], int]:
    """The likelihood of every (prompt, continuation) under a language model.

    Returns:
        One likelihood a pair, in order, and how many prompts lost their beginning for being too long.

    Raises:
        InputError: a prompt has no tokens, or a continuation alone is too long for the model.
    """
    contexts, continuations, cut = [], [], 0
    for prompt, continuation in pairs:
        context, tokens = encode_pair(model.tokenizer, prompt, continuation)
        fitting = fit(context, tokens, model.config.max_position_embeddings)
        if not fitting:
            raise InputError(
                f"{continuation[:60]!r} after {prompt[-60:]!r}: {len(context)} and {len(tokens)} tokens; expected a "
                f"prompt, and together with it at most {model.config.max_position_embeddings + 1}"
            )
        cut += len(fitting) < len(context)
        contexts.append(fitting)
        continuations.append(tokens)
    with exact_products(model.config.dtype):
        found = continuation_likelihoods(
            model.params, model.config, contexts, continuations, batch_size=batch_size, multiple=MULTIPLE
        )
    return found, cut


def dialogue_rewards(model: Model, dialogues: Sequence[Sequence[Turn]], batch_size: int) -> tuple[np.ndarray, int]:
    """A reward model's normalised scores of dialogues that end with the response to score.

    Returns:
        [n] float64, and how many dialogues lost their beginning for being too long.
    """
    rows, cut = [], 0
    for dialogue in dialogues:
        tokens = dialogue_tokens(model.tokenizer, dialogue)
        if not model.score_at_end:
            tokens = tokens[:-1]
        cut += len(tokens) > model.config.max_position_embeddings
        rows.append(tokens[-model.config.max_position_embeddings :])
    if not rows:
        return np.zeros(0), 0
    with exact_products(model.config.dtype):
        raw = score_sequences(model.params, model.config, rows, batch_size=batch_size, multiple=REWARD_MULTIPLE)
    return (raw.astype(np.float64) - model.reward_mean) / model.reward_std, cut
