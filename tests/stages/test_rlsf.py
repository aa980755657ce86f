"""PPO's rollouts and updates, through the code that the stage runs."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig, PpoConfig
from almost_jax.core.heads import add_head, sequence_scores
from almost_jax.core.llama import LlamaConfig, RopeConfig, init_params
from almost_jax.core.losses import length_mask
from almost_jax.errors import InputError, TrainingDiverged
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.models import load_model, save_model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.sampler import Samples, sample
from almost_jax.stages import reward, rlsf, rollouts, sft
from almost_jax.stages.rollouts import Players

CONFIG = LlamaConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-3,
    rope=RopeConfig(theta=1234.0),
    initializer_range=0.4,
)
EOS, HUMAN = 2, 3
PLAYERS = Players(
    policy=CONFIG,
    critic=CONFIG,
    reward=CONFIG,
    temperature=0.7,
    stop_tokens=(EOS, HUMAN),
    eos_id=EOS,
    reward_mean=0.3,
    reward_std=1.7,
    value_shift=0.3,
    value_scale=1.7,
)
PPO = PpoConfig(kl_coef=0.13, gamma=0.97, gae_lambda=0.9, missing_eos_penalty=0.6, reward_clip=1.6)


def scored(seed: int) -> dict[str, Any]:
    """A tree with a head."""
    return add_head(init_params(CONFIG, jax.random.key(seed)), CONFIG, jax.random.key(seed + 1), stddev=0.5)


@functools.cache
def real_rollouts(temperature: float, parts: int = 2) -> tuple[dict[str, Any], Samples, rollouts.Rollouts, Players]:
    """Ragged prompts, sampled and judged by the shipped programs; the reference is the policy."""
    policy = init_params(CONFIG, jax.random.key(1))
    prompts = jax.random.randint(jax.random.key(2), (8, 11), 4, CONFIG.vocab_size, jnp.int32)
    lengths = jnp.array([3, 11, 1, 7, 5, 2, 9, 4], jnp.int32)
    prompts = jnp.where(length_mask(lengths, 11), prompts, 0)
    rules = SamplingRules(temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=13, stop_tokens=(EOS, HUMAN))
    samples = sample(policy, CONFIG, prompts, lengths, jax.random.split(jax.random.key(3), 8), None, rules)
    players = dataclasses.replace(PLAYERS, temperature=temperature)
    judged = rollouts.judge(policy, policy, scored(5), scored(7), prompts, lengths, samples, players, parts)
    return policy, samples, judged, players


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_16_policy_equals_reference_gives_kl_0_and_first_ratio_1(temperature: float) -> None:
    policy, samples, judged, players = real_rollouts(temperature)
    mask = length_mask(samples.lengths, 13)
    assert len(set(np.asarray(samples.lengths).tolist())) > 3, "rows must be ragged to prove anything"
    np.testing.assert_allclose(judged.logprobs, judged.reference_logprobs, atol=1e-6)
    # The sampler's own log-probs, drawn through the cache, are those of the trainer.
    np.testing.assert_allclose(
        np.where(mask, judged.logprobs, 0.0), np.where(mask, samples.logprobs, 0.0), atol=1e-4
    )
    learned, figures = rollouts.experience(judged, jnp.float32(0.13), players, PPO)
    assert abs(float(figures["kl"])) < 1e-5
    batch = {field.name: getattr(learned, field.name) for field in dataclasses.fields(learned)}
    loss, (weight, metrics) = rlsf.ppo_loss_sums({"policy": policy, "critic": scored(5)}, batch, players, PPO)
    ratio, tokens = metrics["ratio"]
    assert float(ratio / tokens) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["approx_kl"][0]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["clip_fraction"][0]) == 0.0
    assert int(tokens) == int(np.asarray(samples.lengths).sum()) == int(weight)
    assert math.isfinite(float(loss))


def test_16_temperature_is_really_applied() -> None:
    policy, samples, judged, players = real_rollouts(0.7)
    hot, _ = rollouts.response_logprobs(
        policy, CONFIG, judged.tokens, judged.prompt_lengths, judged.responses, 1.0
    )
    mask = length_mask(samples.lengths, 13)
    assert float(jnp.max(jnp.abs(hot - judged.logprobs), where=mask, initial=0.0)) > 0.05


def test_17_each_row_gets_its_score_once_and_the_sum_is_score_minus_kl() -> None:
    _, samples, judged, players = real_rollouts(0.7)
    judged = judged.replace(reference_logprobs=judged.reference_logprobs - 0.21)
    ppo = PPO.model_copy(update={"gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False})
    learned, figures = rollouts.experience(judged, jnp.float32(0.13), players, ppo)
    lengths = np.asarray(samples.lengths)
    normalized = (np.asarray(judged.scores) - 0.3) / 1.7
    clipped = np.clip(normalized, -1.6, 1.6)
    assert (clipped != normalized).any() and (clipped == normalized).any()
    last = np.asarray(samples.tokens)[np.arange(8), lengths - 1]
    assert (last == EOS).any() and (last != EOS).any()
    expected = np.where(last == EOS, clipped, clipped - 0.6) - 0.13 * 0.21 * lengths
    # With gamma = lambda = 1 the return of a row's first token is the sum of its shaped rewards.
    np.testing.assert_allclose(np.asarray(learned.returns)[:, 0], expected, atol=1e-5)
    assert learned.returns.dtype == jnp.float32
    assert float(figures["shaped_reward"]) == pytest.approx(expected.mean(), abs=1e-5)
    assert float(figures["kl"]) == pytest.approx((0.21 * lengths).mean(), abs=1e-5)
    # The score stands at each row's own last token and nowhere else.
    final = np.asarray(learned.returns)[np.arange(8), lengths - 1]
    np.testing.assert_allclose(final, np.where(last == EOS, clipped, clipped - 0.6) - 0.13 * 0.21, atol=1e-5)


def test_17_reward_model_reads_prompt_response_and_end_of_text() -> None:
    prompts = jnp.array([[1, 9, 8, 0, 0], [1, 9, 8, 7, 6], [1, 4, 0, 0, 0], [1, 5, 6, 0, 0]], jnp.int32)
    responses = jnp.array([[11, EOS, 0, 0], [12, 13, 14, 15], [12, HUMAN, 0, 0], [EOS, 0, 0, 0]], jnp.int32)
    tokens, lengths = rollouts.reward_inputs(
        prompts, jnp.array([3, 5, 2, 3]), responses, jnp.array([2, 4, 2, 1]), (EOS, HUMAN), EOS
    )
    expected = [[1, 9, 8, 11, EOS], [1, 9, 8, 7, 6, 12, 13, 14, 15, EOS], [1, 4, 12, EOS], [1, 5, 6, EOS]]
    assert tokens.shape == (4, 10)
    for row, length, wanted in zip(np.asarray(tokens), np.asarray(lengths), expected, strict=True):
        assert row[:length].tolist() == wanted
        assert (row[length:] == 0).all()


def test_17_scores_of_rollouts_are_the_reward_models_own() -> None:
    _, samples, judged, _ = real_rollouts(0.7)
    for row in range(8):
        prompt = np.asarray(judged.tokens)[row, : int(judged.prompt_lengths[row])].tolist()
        content = np.asarray(samples.tokens)[row, : int(samples.lengths[row])].tolist()
        content = content[:-1] if content[-1] in (EOS, HUMAN) else content
        alone = jnp.array([[*prompt, *content, EOS]], jnp.int32)
        expected = sequence_scores(scored(7), CONFIG, alone, jnp.array([alone.shape[1]]))
        assert float(judged.scores[row]) == pytest.approx(float(expected[0]), abs=1e-5)


def test_23_missing_end_penalty_looks_at_the_response_with_the_end_of_text_alone() -> None:
    _, _, judged, players = real_rollouts(0.7)
    # Rows: ends by eos; runs on into a human turn; runs out; only the prompt and the padding hold an eos.
    responses = jnp.array([[9, EOS, 0], [9, HUMAN, 0], [9, 8, 7], [9, 8, EOS]], jnp.int32)
    four = jax.tree.map(lambda x: x[:4], judged).replace(
        tokens=judged.tokens[:4].at[3, 0].set(EOS),
        responses=responses,
        lengths=jnp.array([2, 2, 3, 2], jnp.int32),
        scores=jnp.full((4,), 0.3, jnp.float32),
        logprobs=jnp.zeros((4, 3), jnp.float32),
        reference_logprobs=jnp.zeros((4, 3), jnp.float32),
        values=jnp.zeros((4, 3), jnp.float32),
    )
    learned, figures = rollouts.experience(
        four, jnp.float32(0.13), players, PPO.model_copy(update={"whiten_advantages": False})
    )
    last = np.asarray(learned.returns)[np.arange(4), [1, 1, 2, 1]]
    np.testing.assert_allclose(last, [0.0, -0.6, -0.6, -0.6], atol=1e-6)
    assert float(figures["missing_eos"]) == 0.75


def test_24_metrics_count_unmasked_tokens_only() -> None:
    policy, samples, judged, players = real_rollouts(0.7)
    mask = np.asarray(length_mask(samples.lengths, 13))
    poison = jax.tree.map(lambda x: x, judged).replace(
        logprobs=jnp.where(mask, judged.logprobs, jnp.nan),
        reference_logprobs=jnp.where(mask, judged.reference_logprobs - 0.1, jnp.nan),
        values=jnp.where(mask, judged.values, jnp.nan),
    )
    learned, figures = rollouts.experience(poison, jnp.float32(0.13), players, PPO)
    assert float(figures["kl"]) == pytest.approx(0.1 * float(samples.lengths.sum()) / 8, abs=1e-4)
    assert all(bool(jnp.isfinite(value).all()) for value in figures.values())
    batch = {field.name: getattr(learned, field.name) for field in dataclasses.fields(learned)}
    _, (_, metrics) = rlsf.ppo_loss_sums({"policy": policy, "critic": scored(5)}, batch, players, PPO)
    _, entropies = rollouts.response_logprobs(
        policy, CONFIG, judged.tokens, judged.prompt_lengths, judged.responses, 0.7
    )
    entropy, tokens = metrics["entropy"]
    assert float(entropy / tokens) == pytest.approx(float(np.asarray(entropies)[mask].mean()), abs=1e-5)
    assert all(math.isfinite(float(total)) and float(count) == mask.sum() for total, count in metrics.values())


def test_rows_do_not_depend_on_the_number_of_parts() -> None:
    whole, split = (real_rollouts(0.7, parts)[2] for parts in (1, 4))
    mask = length_mask(whole.lengths, 13)
    for name in ("tokens", "responses", "lengths", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(split, name))
    np.testing.assert_allclose(whole.scores, split.scores, atol=1e-5)
    for name in ("logprobs", "values"):
        np.testing.assert_allclose(
            np.where(mask, getattr(whole, name), 0.0), np.where(mask, getattr(split, name), 0.0), atol=1e-5
        )
