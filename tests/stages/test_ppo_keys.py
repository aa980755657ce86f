"""Every key of PPO's mathematics reaches it: the functions that the stage runs against numpy, with odd values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import PpoConfig
from almost_jax.core.heads import add_head, sequence_scores
from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.rotary import RopeConfig
from almost_jax.core.train import accumulate_gradients
from almost_jax.stages import rollouts, updates
from almost_jax.stages.rollouts import Players, Rollouts

SHAPE = LlamaConfig(
    vocab_size=23, hidden_size=12, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=6,
    rms_norm_eps=1e-3, rope=RopeConfig(theta=1234.0), initializer_range=0.5,
)  # fmt: skip
EOS = 2
PLAYERS = Players(
    policy=SHAPE, critic=SHAPE, reward=SHAPE, temperature=0.8, eos_id=EOS, reward_mean=0.4,
    reward_std=1.9, value_shift=0.4, value_scale=1.9,
)  # fmt: skip
LENGTHS = np.array([5, 3, 1, 4, 2, 5, 1, 3], np.int32)
STARTS = np.array([2, 4, 1, 3, 4, 2, 3, 1], np.int32)
WIDTH, PROMPT = 5, 4
REAL = np.arange(WIDTH)[None, :] < LENGTHS[:, None]
LOGPROBS = jax.jit(rollouts.response_logprobs, static_argnums=(1, 5))
VALUES = jax.jit(rollouts.response_values, static_argnums=(1, 4))
ODD = {
    "gamma": 0.83, "gae_lambda": 0.61, "reward_clip": 1.1, "missing_eos_penalty": 0.37, "cliprange": 0.13,
    "cliprange_value": 0.29, "dual_clip": 1.7, "vf_coef": 0.43, "entropy_coef": 0.071, "kl_coef": 0.19,
}  # fmt: skip


def made(seed: int = 0) -> Rollouts:
    """Rollouts of ragged rows; what lies behind a row's end is not a number."""
    rng = np.random.default_rng(seed)
    responses = rng.integers(4, SHAPE.vocab_size, (8, WIDTH)).astype(np.int32)
    for row in (0, 2, 5):
        responses[row, LENGTHS[row] - 1] = EOS
    responses[1, LENGTHS[1] - 1] = 3  # stopped, and not by the end of text
    prompts = rng.integers(4, SHAPE.vocab_size, (8, PROMPT)).astype(np.int32)
    tokens = rollouts.joined(*map(jnp.asarray, (prompts, STARTS, responses, LENGTHS)), PROMPT + WIDTH)

    def figures(scale: float) -> jax.Array:
        return jnp.asarray(np.where(REAL, rng.normal(size=REAL.shape) * scale, np.nan), jnp.float32)

    return Rollouts(
        tokens=tokens, prompt_lengths=jnp.asarray(STARTS), responses=jnp.asarray(responses),
        lengths=jnp.asarray(LENGTHS), logprobs=figures(1.0), entropies=figures(1.0), reference_logprobs=figures(1.0),
        values=figures(1.5), scores=jnp.asarray(rng.normal(size=8) * 4, jnp.float32),
    )  # fmt: skip


def by_hand(given: Rollouts, ppo: PpoConfig) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns, token by token in float64."""
    scores = np.asarray(given.scores, np.float64)
    if ppo.normalize_reward:
        scores = (scores - PLAYERS.reward_mean) / PLAYERS.reward_std
    scores = np.clip(scores, -ppo.reward_clip, ppo.reward_clip)
    last = np.asarray(given.responses)[np.arange(8), LENGTHS - 1]
    scores = np.where(last == EOS, scores, scores - ppo.missing_eos_penalty)
    gap = np.asarray(given.logprobs, np.float64) - np.asarray(given.reference_logprobs, np.float64)
    kl = {"k1": gap, "k2": gap**2 / 2, "k3": np.exp(-gap) - 1 + gap}[ppo.kl_estimator]
    rewards = np.where(REAL, -ppo.kl_coef * kl if ppo.kl_in == "reward" else 0.0, 0.0)
    rewards[np.arange(8), LENGTHS - 1] += scores
    if ppo.whiten_rewards:
        seen = rewards[REAL]
        rewards = np.where(REAL, (rewards - seen.mean()) / np.sqrt(seen.var() + 1e-8) + seen.mean(), 0.0)
    values = np.asarray(given.values, np.float64)
    advantages = np.zeros_like(rewards)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            for later in range(t, length):
                following = values[row, later + 1] if later + 1 < length else 0.0
                delta = rewards[row, later] + ppo.gamma * following - values[row, later]
                advantages[row, t] += (ppo.gamma * ppo.gae_lambda) ** (later - t) * delta
    returns = np.where(REAL, advantages + values, 0.0)
    if ppo.whiten_advantages:
        seen = advantages[REAL]
        advantages = np.where(REAL, (advantages - seen.mean()) / np.sqrt(seen.var() + 1e-8), 0.0)
    return advantages, returns


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"whiten_rewards": True},
        {"whiten_advantages": False},
        {"normalize_reward": False, "whiten_advantages": False},
        {"kl_estimator": "k2", "whiten_advantages": False},
        {"kl_estimator": "k3", "whiten_advantages": False},
        {"kl_in": "loss", "whiten_advantages": False},
    ],
)
def test_15_17_18_experience_is_what_the_keys_say(changed: dict[str, Any]) -> None:
    given, ppo = made(), PpoConfig.model_validate({**ODD, **changed})
    learned, figures = rollouts.experience(given, jnp.float32(ppo.kl_coef), PLAYERS, ppo)
    advantages, returns = by_hand(given, ppo)
    np.testing.assert_allclose(learned.advantages, advantages, atol=2e-5)
    np.testing.assert_allclose(learned.returns, returns, atol=2e-5)
    assert float(figures["missing_eos"]) == 5 / 8
    assert (learned.reference_logprobs is None) == (ppo.kl_in == "reward")
    # No key is without effect here, so that none can be read in another's place.
    plain = by_hand(given, PpoConfig.model_validate({**ODD, "whiten_advantages": False}))[0]
    for key, value in (("gamma", 0.7), ("gae_lambda", 0.7), ("reward_clip", 0.9), ("missing_eos_penalty", 0.2)):
        other = PpoConfig.model_validate({**ODD, "whiten_advantages": False, key: value})
        assert np.abs(by_hand(given, other)[0] - plain).max() > 1e-2, key


@functools.cache
def models() -> dict[str, Any]:
    policy = init_params(SHAPE, jax.random.key(1))
    return {"policy": policy, "critic": add_head(policy, SHAPE, jax.random.key(2), stddev=0.7)}


def batch_of(params: dict[str, Any], ppo: PpoConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What an update is given, and what the models say of it: ratios and values lie within and beyond their clips."""
    given, rng = made(3), np.random.default_rng(4)
    now, entropies = LOGPROBS(
        params["policy"], SHAPE, given.tokens, given.prompt_lengths, given.responses, PLAYERS.temperature
    )
    values = VALUES(params["critic"], PLAYERS, given.tokens, given.prompt_lengths, WIDTH)
    noise = [np.asarray(rng.normal(size=REAL.shape) * scale, np.float32) for scale in (0.5, 0.4, 1.0, 1.0, 0.3)]
    batch = {
        "tokens": given.tokens, "prompt_lengths": given.prompt_lengths, "responses": given.responses,
        "lengths": given.lengths, "old_logprobs": now + noise[0], "old_values": values + noise[1],
        "advantages": jnp.asarray(noise[2]), "returns": values + noise[3], "kl_coef": jnp.full((8,), ppo.kl_coef),
    }  # fmt: skip
    if ppo.kl_in == "loss":
        batch["reference_logprobs"] = now + noise[4]
    said = {"logprobs": now, "entropies": entropies, "values": values}
    return batch, {name: np.asarray(array, np.float64) for name, array in said.items()}


def loss_by_hand(batch: dict[str, Any], said: dict[str, np.ndarray], ppo: PpoConfig) -> float:
    """The mean loss of a batch in float64."""
    own = {name: np.asarray(array, np.float64) for name, array in batch.items()}
    ratio, advantages = np.exp(said["logprobs"] - own["old_logprobs"]), own["advantages"]
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 1 - ppo.cliprange, 1 + ppo.cliprange))
    policy = np.where(advantages < 0, np.minimum(policy, -ppo.dual_clip * advantages), policy)
    near = own["old_values"] + np.clip(said["values"] - own["old_values"], -ppo.cliprange_value, ppo.cliprange_value)
    value = 0.5 * np.maximum((said["values"] - own["returns"]) ** 2, (near - own["returns"]) ** 2)
    losses = policy + ppo.vf_coef * value - ppo.entropy_coef * said["entropies"]
    if ppo.kl_in == "loss":
        gap = said["logprobs"] - own["reference_logprobs"]
        kl = {"k1": gap, "k2": gap**2 / 2, "k3": np.exp(-gap) - 1 + gap}[ppo.kl_estimator]
        losses = losses + ppo.kl_coef * ratio * kl
    if ppo.loss_average == "token_mean":
        return float(losses[REAL].mean())
    if ppo.loss_average == "sequence_mean":
        return float(np.mean([losses[row, :length].mean() for row, length in enumerate(LENGTHS)]))
    return float(losses[REAL].sum() / losses.size)


KINDS: list[dict[str, Any]] = [
    {"loss_average": "token_mean"},
    {"loss_average": "sequence_mean"},
    {"loss_average": "fixed_length", "kl_in": "loss", "kl_estimator": "k3"},
    {"loss_average": "sequence_mean", "kl_in": "loss", "kl_estimator": "k2"},
]


@pytest.mark.parametrize("changed", KINDS)
def test_21_22_the_loss_is_what_the_keys_say_in_one_part_or_eight(changed: dict[str, Any]) -> None:
    ppo, params = PpoConfig.model_validate({**ODD, **changed}), models()
    batch, said = batch_of(params, ppo)
    expected = loss_by_hand(batch, said, ppo)

    def loss_sums(params: Any, part: Any) -> Any:
        return updates.ppo_loss_sums(params, part, PLAYERS, ppo)

    whole, eighths = (
        jax.jit(lambda params, batch, parts=parts: accumulate_gradients(loss_sums, params, batch, parts))(params, batch)
        for parts in (1, 8)
    )
    assert float(whole[1]["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(eighths[1]["loss"]) == pytest.approx(expected, rel=1e-4)
    for one, other in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(eighths[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for key in ("cliprange", "cliprange_value", "dual_clip", "vf_coef", "entropy_coef"):
        other = PpoConfig.model_validate({**ODD, **changed, key: ODD[key] * 1.3})
        assert abs(loss_by_hand(batch, said, other) - expected) > 1e-4, key


def test_a_value_is_of_what_came_before_its_token() -> None:
    given, critic = made(), models()["critic"]
    values = np.asarray(VALUES(critic, PLAYERS, given.tokens, given.prompt_lengths, WIDTH))
    places = [(row, place) for row, length in enumerate(LENGTHS) for place in range(length)]
    before = np.array([STARTS[row] + place for row, place in places], np.int32)
    rows = np.asarray(given.tokens)[[row for row, _ in places]]
    rows = np.where(np.arange(rows.shape[1])[None, :] < before[:, None], rows, 0)
    raw = jax.jit(sequence_scores, static_argnums=1)(critic, SHAPE, jnp.asarray(rows), jnp.asarray(before))
    found = [values[row, place] for row, place in places]
    np.testing.assert_allclose(np.array(found) * 1.9 + 0.4, raw, atol=1e-5)
