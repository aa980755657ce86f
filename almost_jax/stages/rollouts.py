"""Rollouts for PPO: responses of the policy, and what policy, reference, critic and reward model say of them.

Rows are prompt + response, packed from the left and padded on the right to P + G; arrays over a response are [B, G],
indexed from its first token. Everything here is arrays and jitted; the loop is in `rlsf.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from almost_jax.config import PpoConfig
from almost_jax.core.heads import sequence_scores, token_scores
from almost_jax.core.llama import LlamaConfig, Params, hidden_states
from almost_jax.core.losses import length_mask, masked_mean, masked_var, whiten, window
from almost_jax.core.partitioning import platform
from almost_jax.core.rl import (
    clip_scores,
    ended,
    gae,
    kl_estimates,
    penalize_missing_end,
    sequence_kl,
    shaped_rewards,
)
from almost_jax.core.vocabulary import hidden_figures
from almost_jax.sampling.layout import decode_layout
from almost_jax.sampling.rows import Samples


@dataclasses.dataclass(frozen=True)
class Players:
    """What the programs need to know of the models, beside their parameters; hashable, a static argument.

    `reward_mean` and `reward_std` are the reward model's moments; values of the critic are the head's after
    (x - value_shift) / value_scale, so that a critic which starts as the reward model predicts normalised rewards.
    """

    policy: LlamaConfig
    critic: LlamaConfig
    reward: LlamaConfig
    temperature: float
    eos_id: int
    reward_mean: float
    reward_std: float
    value_shift: float
    value_scale: float


@struct.dataclass
class Rollouts:
    """A batch of responses and what the models say of them.

    tokens: [B, P + G] int32, prompt + response. prompt_lengths, lengths: [B] int32, the latter counting the response's
    tokens, those of a stop included. responses: [B, G] int32. logprobs, entropies, reference_logprobs, values: [B, G]
    float32, at the sampling temperature; meaningless beyond `lengths`; no reference_logprobs where there is no
    reference. scores: [B] float32, the reward model's, not normalised.
    """

    tokens: Array
    prompt_lengths: Array
    responses: Array
    lengths: Array
    logprobs: Array
    entropies: Array
    reference_logprobs: Array | None
    values: Array
    scores: Array


def joined(prompts: Array, prompt_lengths: Array, responses: Array, lengths: Array, width: int) -> Array:
    """Prompts [B, P] and responses [B, G], each cut to its length, as rows [B, width] without a gap; zeros behind."""
    places = jnp.arange(width)[None, :]
    behind = places - prompt_lengths[:, None]
    first = jnp.take_along_axis(prompts, jnp.minimum(places, prompts.shape[1] - 1), axis=1)
    second = jnp.take_along_axis(responses, jnp.clip(behind, 0, responses.shape[1] - 1), axis=1)
    return jnp.where(behind < 0, first, jnp.where(behind < lengths[:, None], second, 0))


def reward_inputs(
    prompts: Array, prompt_lengths: Array, responses: Array, content: Array, eos_id: int
) -> tuple[Array, Array]:
    """What the reward model reads: prompt, response without what stopped it, end of text.

    Args:
        prompts: [B, P] int32, beginning of text first if the tokenizer has one.
        prompt_lengths: [B] int32.
        responses: [B, G] int32.
        content: [B] int32, how many tokens of each response count.
        eos_id: the end of text.

    Returns:
        Tokens [B, P + G + 1] and lengths [B], both int32.
    """
    width = prompts.shape[1] + responses.shape[1] + 1
    rows = joined(prompts, prompt_lengths, responses, content, width)
    end = prompt_lengths + content
    return jnp.where(jnp.arange(width)[None, :] == end[:, None], jnp.asarray(eos_id, rows.dtype), rows), end + 1


def response_logprobs(
    params: Params, config: LlamaConfig, tokens: Array, prompt_lengths: Array, responses: Array, temperature: float
) -> tuple[Array, Array]:
    """Log-probs of responses and the policy's entropy at each of their tokens; prompts are never unembedded.

    Args:
        params: a policy, in the layout that `config` says.
        config: its shape.
        tokens: [B, P + G] int32, prompt + response.
        prompt_lengths: [B] int32, at least 1.
        responses: [B, G] int32.
        temperature: of the sampler.

    Returns:
        Log-probs and entropies, [B, G] float32.
    """
    states = window(hidden_states(params, config, tokens), prompt_lengths - 1, responses.shape[1])
    figures = hidden_figures(params, config, states, responses, temperature, with_entropy=True)
    return figures.logprobs, figures.entropy


def response_values(
    params: Params, players: Players, tokens: Array, prompt_lengths: Array, size: int
) -> Array:
    """The critic's values [B, size] float32, each before its response token was drawn."""
    raw = window(token_scores(params, players.critic, tokens), prompt_lengths - 1, size)
    return (raw - players.value_shift) / players.value_scale


@functools.partial(jax.jit, static_argnames=("players", "parts"))
def judge(
    policy: Params,
    reference: Params | None,
    critic: Params,
    reward: Params,
    prompts: Array,
    prompt_lengths: Array,
    samples: Samples,
    players: Players,
    parts: int,
) -> Rollouts:
    """Everything that is known of a batch of samples before any update.

    The policy is run again over what it sampled, by the function and the attention that its updates go through
    (`actors.training_players`): the first ratio is then exactly 1, whatever the decoding loop's rounding.

    Args:
        policy, reference, critic, reward: parameter trees, the latter two with a head; no reference is run when None.
        prompts: [B, P] int32.
        prompt_lengths: [B] int32.
        samples: of the policy.
        players: the models' shapes.
        parts: rows go through the models in so many parts, one after another, to bound memory.
    """
    flat_policy, policy_config = decode_layout(policy, players.policy, platform())
    flat_reference = None if reference is None else decode_layout(reference, players.policy, platform())[0]
    flat_critic, critic_config = decode_layout(critic, players.critic, platform())
    flat_reward, reward_config = decode_layout(reward, players.reward, platform())
    flat = dataclasses.replace(players, policy=policy_config, critic=critic_config, reward=reward_config)

    def one(rows: tuple[Array, Array, Array, Array, Array]) -> Rollouts:
        prompt, prompt_length, response, length, content = rows
        tokens = joined(prompt, prompt_length, response, length, prompt.shape[1] + response.shape[1])
        ours, entropies = response_logprobs(
            flat_policy, flat.policy, tokens, prompt_length, response, flat.temperature
        )
        theirs = None
        if flat_reference is not None:
            theirs = response_logprobs(
                flat_reference, flat.policy, tokens, prompt_length, response, flat.temperature
            )[0]
        read = reward_inputs(prompt, prompt_length, response, content, flat.eos_id)
        return Rollouts(
            tokens=tokens,
            prompt_lengths=prompt_length,
            responses=response,
            lengths=length,
            logprobs=ours,
            entropies=entropies,
            reference_logprobs=theirs,
            values=response_values(flat_critic, flat, tokens, prompt_length, response.shape[1]),
            scores=sequence_scores(flat_reward, flat.reward, *read),
        )

    rows = prompts, prompt_lengths, samples.tokens, samples.lengths, samples.content
    if parts == 1:
        return one(rows)
    return _merged(jax.lax.map(one, _split(rows, parts)))


@struct.dataclass
class Experience:
    """What updates learn from: rollouts with advantages and returns, [B, G] float32, 0 beyond `lengths`.

    The reference's log-probs are there when the KL penalty is in the loss.
    """

    tokens: Array
    prompt_lengths: Array
    responses: Array
    lengths: Array
    old_logprobs: Array
    old_values: Array
    advantages: Array
    returns: Array
    reference_logprobs: Array | None = None


@functools.partial(jax.jit, static_argnames=("players", "ppo"))
def experience(
    rollouts: Rollouts, kl_coef: Array, players: Players, ppo: PpoConfig
) -> tuple[Experience, dict[str, Any]]:
    """Rewards, advantages and returns of a whole batch, before it is split into mini-batches.

    Args:
        rollouts: a batch.
        kl_coef: float32 scalar.
        players: the models' shapes.
        ppo: the config; see `core.rl` for the order of things.

    Returns:
        The experience, and figures: scalars over unmasked tokens or responses, and arrays for the tables of rollouts:
        `row_score` and `row_reward` (what the score became), [B], and `token_kl` and `token_reward`, [B, G]. Without
        a reference there is no KL among them.
    """
    mask = length_mask(rollouts.lengths, rollouts.responses.shape[1])
    scores = rollouts.scores
    if ppo.normalize_reward:
        scores = (scores - players.reward_mean) / players.reward_std
    # The end of text is what a fine-tuned model is to end by; running on into a human turn is not an end.
    finished = ended(rollouts.responses, rollouts.lengths, (players.eos_id,))
    scores = penalize_missing_end(clip_scores(scores, ppo.reward_clip), finished, ppo.missing_eos_penalty)
    figures: dict[str, Any] = {}
    penalty = jnp.zeros(mask.shape, jnp.float32)
    if rollouts.reference_logprobs is not None:
        token_kl = kl_estimates(rollouts.logprobs, rollouts.reference_logprobs, "k1")
        figures = {"kl": sequence_kl(token_kl, mask).mean(), "token_kl": jnp.where(mask, token_kl, 0.0)}
        if ppo.kl_in == "reward":
            penalty = kl_estimates(rollouts.logprobs, rollouts.reference_logprobs, ppo.kl_estimator)
    rewards = shaped_rewards(scores, penalty, mask, kl_coef)
    whitened = whiten(rewards, mask, shift_mean=False) if ppo.whiten_rewards else rewards
    advantages, returns = gae(whitened, rollouts.values, mask, ppo.gamma, ppo.gae_lambda)
    unexplained = masked_var(returns - rollouts.values, mask)
    figures |= {
        "reward": rollouts.scores.mean(),
        "score": scores.mean(),
        "shaped_reward": jnp.sum(rewards, axis=1, where=mask).mean(),
        "explained_variance": 1.0 - unexplained / jnp.maximum(masked_var(returns, mask), 1e-8),
        "advantage": masked_mean(advantages, mask),
        "return": masked_mean(returns, mask),
        "rollout_entropy": masked_mean(rollouts.entropies, mask),
        "response_length": rollouts.lengths.astype(jnp.float32).mean(),
        "missing_eos": 1.0 - finished.astype(jnp.float32).mean(),
        "row_score": rollouts.scores,
        "row_reward": scores,
        "token_reward": rewards,
    }
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, shift_mean=True)
    learned = Experience(
        tokens=rollouts.tokens,
        prompt_lengths=rollouts.prompt_lengths,
        responses=rollouts.responses,
        lengths=rollouts.lengths,
        old_logprobs=rollouts.logprobs,
        old_values=rollouts.values,
        advantages=advantages,
        returns=returns,
        reference_logprobs=rollouts.reference_logprobs if ppo.kl_in == "loss" else None,
    )
    return learned, figures


def _split(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]; part i has rows i, i + parts, ..., so each keeps every device's share."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), tree)


def _merged(tree: Any) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)
