"""The mathematics of PPO against oracles written from the definitions, and against cases worked out by hand."""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core import llama, losses, rl
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.partitioning import batch_sharding, make_mesh

TOKENS = "token_mean"
LENGTHS = np.array([7, 1, 4, 0, 6, 2, 7, 3], np.int32)
MASK = np.arange(7)[None] < LENGTHS[:, None]


def ragged(seed: int, padding: float = np.nan) -> np.ndarray:
    """[8, 7] random values; what lies at padding must never be read."""
    return np.where(MASK, np.random.default_rng(seed).normal(size=MASK.shape), padding).astype(np.float32)


def means(terms: losses.LossTerms) -> dict[str, float]:
    return {name: float(total / number) for name, (total, number) in terms[1][1].items()}


def oracle_deltas(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """One unpadded row: A_t = sum of (gamma lambda)^l delta_(t + l), one pair (t, l) at a time."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    out = np.zeros(n)
    for t in range(n):
        for later in range(t, n):
            delta = rewards[later] + gamma * following[later] - values[later]
            out[t] += (gamma * gae_lambda) ** (later - t) * delta
    return out


def oracle_steps(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """The other side of eq. 16: the lambda-weighted mean of the k-step advantages, the last one taking what is left."""
    n = len(rewards)
    out = np.zeros(n)
    for t in range(n):
        for k in range(1, n - t + 1):
            bootstrap = gamma**k * values[t + k] if t + k < n else 0.0
            steps = sum(gamma**i * rewards[t + i] for i in range(k)) + bootstrap - values[t]
            out[t] += steps * (gae_lambda ** (k - 1) * (1 - gae_lambda) if t + k < n else gae_lambda ** (k - 1))
    return out


@pytest.mark.parametrize("gamma, gae_lambda", [(0.93, 0.71), (1.0, 0.95), (0.8, 1.0), (0.9, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("padding", [np.nan, 1e6])
def test_15_gae_equals_oracles_on_ragged_lengths(gamma: float, gae_lambda: float, padding: float) -> None:
    rewards, values = ragged(0, padding), ragged(1, padding)
    arrays = jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASK)
    advantages, returns = (np.asarray(x) for x in rl.gae(*arrays, gamma, gae_lambda))
    assert advantages.dtype == returns.dtype == np.float32
    for row, n in enumerate(LENGTHS):
        r, v = rewards[row, :n].astype(np.float64), values[row, :n].astype(np.float64)
        np.testing.assert_allclose(advantages[row, :n], oracle_deltas(r, v, gamma, gae_lambda), atol=1e-5)
        np.testing.assert_allclose(advantages[row, :n], oracle_steps(r, v, gamma, gae_lambda), atol=1e-5)
        np.testing.assert_allclose(returns[row, :n], advantages[row, :n] + v, atol=1e-5)
    np.testing.assert_array_equal(advantages[~MASK], 0)
    np.testing.assert_array_equal(returns[~MASK], 0)


def test_15_undiscounted_gae_is_future_rewards_minus_value() -> None:
    rewards, values = ragged(2), ragged(3)
    advantages, returns = rl.gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASK), 1.0, 1.0)
    for row, n in enumerate(LENGTHS):
        future = np.cumsum(rewards[row, :n][::-1])[::-1]
        np.testing.assert_allclose(advantages[row, :n], future - values[row, :n], atol=1e-5)
        np.testing.assert_allclose(returns[row, :n], future, atol=1e-5)


def test_15_value_after_the_end_is_zero_and_no_gradient_passes() -> None:
    rewards, values = jnp.asarray([[0.5, 2.0, 9.0]]), jnp.asarray([[0.25, 0.75, 100.0]])
    mask = jnp.asarray([[True, True, False]])
    advantages, _ = rl.gae(rewards, values, mask, 0.9, 0.5)
    np.testing.assert_allclose(advantages, [[0.5 + 0.9 * 0.75 - 0.25 + 0.45 * 1.25, 2.0 - 0.75, 0]], rtol=1e-6)
    gradient = jax.grad(lambda v: sum(x.sum() for x in rl.gae(rewards, v, mask, 0.9, 0.5)))(values)
    np.testing.assert_array_equal(gradient, 0)


def test_15_gae_on_one_device_equals_eight() -> None:
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=1))
    arrays = jnp.asarray(ragged(4)), jnp.asarray(ragged(5)), jnp.asarray(MASK)
    with jax.set_mesh(mesh):
        found = jax.jit(rl.gae, static_argnums=(3, 4))(*jax.device_put(arrays, batch_sharding(mesh)), 0.9, 0.8)
    for one, other in zip(rl.gae(*arrays, 0.9, 0.8), found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_16_policy_equal_to_reference_has_no_kl_and_ratio_one(
    tiny: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], temperature: float
) -> None:
    """The policy by cached decoding as in the sampler, the reference by one pass over prompt + response, padded."""
    params = make_params(tiny, 0)
    prompts, sizes = np.array([2, 4, 3]), np.array([5, 3, 4])
    tokens = jnp.asarray(np.random.default_rng(8).integers(0, 37, (3, 9)), jnp.int32)
    mask = losses.length_mask(jnp.asarray(sizes), 5)

    @jax.jit
    def reference(params: Params, starts: jax.Array) -> jax.Array:
        out = llama.logits(params, tiny, llama.hidden_states(params, tiny, tokens))
        return losses.window(losses.next_token_logprobs(out, tokens, temperature), starts, 5)

    @jax.jit
    def step(params: Params, tokens: jax.Array, cache: llama.Cache, n: jax.Array) -> tuple[jax.Array, llama.Cache]:
        hidden, cache = llama.hidden_states_cached(params, tiny, tokens, cache, n)
        return llama.logits(params, tiny, hidden), cache

    response = losses.window(tokens, jnp.asarray(prompts), 5)
    out, cache = step(params, tokens[:, :4], llama.empty_cache(tiny, 3, 9), jnp.asarray(prompts, jnp.int32))
    last = losses.window(out, jnp.asarray(prompts) - 1, 1)
    drawn = []
    for g in range(5):
        drawn.append(losses.token_logprobs(last, response[:, g : g + 1], temperature))
        last, cache = step(params, response[:, g : g + 1], cache, jnp.ones(3, jnp.int32))
    logprobs = jnp.concatenate(drawn, axis=1)
    expected = reference(params, jnp.asarray(prompts))
    assert jnp.abs(jnp.where(mask, logprobs, 0)).max() > 0.1
    for kind in ("k1", "k2", "k3"):
        kl = rl.kl_estimates(logprobs, expected, kind)
        np.testing.assert_allclose(np.asarray(kl)[np.asarray(mask)], 0, atol=1e-5)
    advantages = jnp.asarray(np.random.default_rng(9).normal(size=(3, 5)), jnp.float32)
    terms = rl.policy_loss(logprobs, expected, advantages, mask, 0.2, 0.0, TOKENS)
    found = means(terms)
    assert abs(found["ratio"] - 1) < 1e-5 and found["clip_fraction"] == 0 and abs(found["approx_kl"]) < 1e-5
    np.testing.assert_allclose(terms[0], -losses.masked_sum(advantages, mask), atol=1e-4)
    wrong = rl.policy_loss(
        logprobs, reference(params, jnp.asarray(prompts) - 1), advantages, mask, 0.2, 0.0, TOKENS
    )
    assert abs(means(wrong)["ratio"] - 1) > 1e-2, "a window off by one is noticed"


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_17_each_row_gets_one_score_at_its_own_last_token(dtype: jax.typing.DTypeLike) -> None:
    scores = jnp.asarray([3, -2], dtype)
    mask = jnp.asarray([[True, True, False, False], [True, True, True, True]])
    found = rl.shaped_rewards(scores, jnp.full((2, 4), jnp.nan).at[0, :2].set(0.0).at[1].set(0.0), mask, 0.3)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [[0, 3, 0, 0], [0, 0, 0, -2]])
    kl = jnp.asarray([[0.5, -0.25, 9, 9], [1, 2, 3, 4]], jnp.float32)
    found = rl.shaped_rewards(jnp.asarray([1.7, -0.3], jnp.float32), kl, mask, 0.1)
    expected = [[-0.05, 0.025 + 1.7, 0, 0], [-0.1, -0.2, -0.3, -0.4 - 0.3]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_17_shaped_rewards_sum_to_score_minus_penalty() -> None:
    kl, scores = ragged(6), np.random.default_rng(7).normal(size=8).astype(np.float32)
    found = np.asarray(rl.shaped_rewards(jnp.asarray(scores), jnp.asarray(kl), jnp.asarray(MASK), 0.37))
    summed = np.asarray(rl.sequence_kl(jnp.asarray(kl), jnp.asarray(MASK)))
    np.testing.assert_allclose(summed, np.where(MASK, kl, 0).sum(1), atol=1e-6)
    filled = LENGTHS > 0
    np.testing.assert_allclose(found.sum(1)[filled], (scores - 0.37 * summed)[filled], atol=1e-5)
    np.testing.assert_array_equal(found[~filled], 0)
    np.testing.assert_array_equal(found[~MASK], 0)


def test_19_monte_carlo_kl_matches_the_analytic_kl_of_a_categorical() -> None:
    rng = np.random.default_rng(0)
    p, q = np.array([0.45, 0.3, 0.2, 0.05]), np.array([0.1, 0.35, 0.15, 0.4])
    draws = rng.choice(4, size=(400, 500), p=p)
    arrays = jnp.asarray(np.log(p)[draws], jnp.float32), jnp.asarray(np.log(q)[draws], jnp.float32)
    analytic = {
        "k1": (p * np.log(p / q)).sum(),
        "k2": (p * 0.5 * np.log(p / q) ** 2).sum(),
        "k3": (p * np.log(p / q)).sum(),
    }
    for kind, expected in analytic.items():
        found = np.asarray(rl.kl_estimates(*arrays, kind), np.float64)
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(found.size)
        assert found.std() / np.sqrt(found.size) < 0.01 * expected
    assert (np.asarray(rl.kl_estimates(*arrays, "k1")) < -1).any(), "no clamp at 0"
    assert min(np.asarray(rl.kl_estimates(*arrays, kind)).min() for kind in ("k2", "k3")) >= 0


def test_19_kl_estimates_by_hand_and_by_name() -> None:
    logprobs, reference = jnp.asarray([[-1.0, -3.0]], jnp.bfloat16), jnp.asarray([[-1.5, -1.0]], jnp.float32)
    np.testing.assert_allclose(rl.kl_estimates(logprobs, reference, "k1"), [[0.5, -2]])
    np.testing.assert_allclose(rl.kl_estimates(logprobs, reference, "k2"), [[0.125, 2]])
    np.testing.assert_allclose(
        rl.kl_estimates(logprobs, reference, "k3"), [[np.exp(-0.5) - 0.5, np.exp(2) - 3]], rtol=1e-5
    )
    with pytest.raises(ValueError, match="'k4' is unknown; known: k1, k2, k3"):
        rl.kl_estimates(logprobs, reference, "k4")


@pytest.mark.parametrize(
    "observed, error", [(60.0, 0.2), (6.6, 0.1), (6.0, 0.0), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)]
)
def test_20_adaptive_coefficient_follows_the_clipped_error(observed: float, error: float) -> None:
    found = rl.update_kl_coef(0.13, observed, target=6.0, horizon=900, batch_size=90)
    np.testing.assert_allclose(found, 0.13 * (1 + 0.1 * error), rtol=1e-6)


def test_20_controller_sees_sums_over_sequences_not_means_over_tokens() -> None:
    kl, mask = jnp.full((2, 5), 0.5, jnp.float32), losses.length_mask(jnp.asarray([5, 1]), 5)
    np.testing.assert_allclose(rl.sequence_kl(kl, mask), [2.5, 0.5])
    # Mean of sums 1.5 is on target; the mean over tokens, 0.5, would have lowered the coefficient.
    np.testing.assert_allclose(rl.update_kl_coef(0.2, rl.sequence_kl(kl, mask).mean(), 1.5, 100, 50), 0.2, rtol=1e-6)


def test_20_coefficient_resumes_with_the_same_bits_through_json() -> None:
    observations = [3.7, 11.0, 6.2, 5.9, -1.0, 8.8]

    def run(coef: jax.Array, part: list[float]) -> jax.Array:
        for observed in part:
            coef = rl.update_kl_coef(coef, observed, target=6.1, horizon=777, batch_size=13)
        return coef

    whole = run(jnp.float32(0.0571), observations)
    saved = json.loads(json.dumps(float(run(jnp.float32(0.0571), observations[:3]))))
    np.testing.assert_array_equal(run(jnp.float32(saved), observations[3:]), whole)
    assert whole != jnp.float32(0.0571)


def test_21_value_clipping_is_around_the_rollout_values() -> None:
    """Clip range 0.3. Columns: inside the range; clipped error larger; unclipped error larger; padding."""
    old = jnp.asarray([[1.0, 1.0, 1.0, 7.0]], jnp.float32)
    values = jnp.asarray([[1.2, 2.0, 2.0, np.nan]], jnp.float32)
    returns = jnp.asarray([[1.6, 2.5, 0.5, -5.0]], jnp.float32)
    mask = jnp.asarray([[True, True, True, False]])
    total, (number, _) = terms = rl.value_loss(values, old, returns, mask, 0.3, TOKENS)
    # (1.2 - 1.6)^2; max((2 - 2.5)^2, (1.3 - 2.5)^2); max((2 - 0.5)^2, (1.3 - 0.5)^2)
    np.testing.assert_allclose(total, 0.5 * (0.16 + 1.44 + 2.25), rtol=1e-5)
    assert number == 3
    found = means(terms)
    np.testing.assert_allclose(
        [found["value_loss"], found["value"], found["value_clip_fraction"]], [3.85 / 6, 5.2 / 3, 1 / 3], rtol=1e-5
    )
    gradient = jax.grad(lambda v: rl.value_loss(v, old, returns, mask, 0.3, TOKENS)[0])(values)
    np.testing.assert_allclose(gradient, [[-0.4, 0, 1.5, 0]], atol=1e-6)


def test_21_policy_clipping_by_hand() -> None:
    """Eps 0.2. The objective is pessimistic: clipped where that is worse, never where it would be better."""
    ratios = np.array([[1.5, 1.5, 0.5, 0.5, 1.1, 3.0]])
    advantages = jnp.asarray([[2.0, -2.0, 2.0, -2.0, 1.0, 5.0]], jnp.float32)
    old = jnp.asarray([[-1.0, -2.0, -0.5, -1.5, -3.0, 0.0]], jnp.float32)
    logprobs = old + jnp.asarray(np.log(ratios), jnp.float32)
    mask = jnp.asarray([[True, True, True, True, True, False]])
    terms = rl.policy_loss(logprobs, old, advantages, mask, 0.2, 0.0, TOKENS)
    np.testing.assert_allclose(terms[0], -(1.2 * 2 - 1.5 * 2 + 0.5 * 2 - 0.8 * 2 + 1.1), rtol=1e-5)
    found = means(terms)
    np.testing.assert_allclose(found["clip_fraction"], 2 / 5)
    np.testing.assert_allclose(found["ratio"], 5.1 / 5, rtol=1e-6)
    np.testing.assert_allclose(found["approx_kl"], (ratios - 1 - np.log(ratios))[0, :5].mean(), rtol=1e-5)
    gradient = jax.grad(lambda x: rl.policy_loss(x, old, advantages, mask, 0.2, 0.0, TOKENS)[0])(logprobs)
    np.testing.assert_allclose(gradient, [[0, 3.0, -1.0, 0, -1.1, 0]], rtol=1e-5)


def test_24_metrics_and_gradients_ignore_what_lies_under_the_mask() -> None:
    mask = jnp.asarray(MASK)
    vocabulary = jax.random.normal(jax.random.key(3), (*MASK.shape, 5), jnp.float32)

    def run(padding: float) -> tuple[losses.LossTerms, tuple[jax.Array, ...]]:
        arrays = [jnp.asarray(ragged(seed, padding)) for seed in range(10, 16)]
        entropies = jnp.where(mask, losses.entropy(vocabulary, 0.9), padding)

        def loss(logprobs: jax.Array, values: jax.Array) -> tuple[jax.Array, losses.LossTerms]:
            policy = rl.policy_loss(logprobs, *arrays[1:3], mask, 0.2, 0.0, TOKENS)
            value = rl.value_loss(values, *arrays[4:6], mask, 0.2, TOKENS)
            terms = rl.ppo_loss(policy, value, entropies, mask, 0.3, 0.01, TOKENS)
            return terms[0], terms

        grads, terms = jax.grad(loss, (0, 1), has_aux=True)(arrays[0], arrays[3])
        return terms, grads

    clean, clean_grads = run(0.0)
    for padding in (np.nan, 1e9, -np.inf):
        terms, grads = run(padding)
        jax.tree.map(np.testing.assert_array_equal, (terms, grads), (clean, clean_grads))
    assert all(np.asarray(number) == LENGTHS.sum() for _, number in clean[1][1].values())
    found = means(clean)
    ratio = np.exp(ragged(10) - ragged(11), where=MASK, out=np.ones(MASK.shape, np.float32))
    clipped = np.where(ragged(12, 0) > 0, ratio > 1.2, ratio < 0.8)[MASK]
    np.testing.assert_allclose(found["clip_fraction"], clipped.mean(), rtol=1e-6)
    assert 0.1 < clipped.mean() < 0.9
    np.testing.assert_allclose(found["entropy"], np.asarray(losses.entropy(vocabulary, 0.9))[MASK].mean(), rtol=1e-5)
    expected = found["policy_loss"] + 0.3 * found["value_loss"] - 0.01 * found["entropy"]
    np.testing.assert_allclose(clean[0] / clean[1][0], expected, rtol=1e-5)


def test_23_the_end_is_looked_for_in_the_response_alone() -> None:
    stop, other_stop, word = 2, 31, 7
    tokens = jnp.asarray(
        [
            [word, stop, 0, 0],  # ended
            [word, other_stop, 0, 0],  # ended by another stop token
            [word, word, stop, stop],  # the stops lie behind its end
            [stop, word, word, word],  # a stop that it went on from is not its end
            [stop, 0, 0, 0],  # only a stop
            [stop, stop, stop, stop],  # an empty response in front of stops
        ],
        jnp.int32,
    )
    lengths = jnp.asarray([2, 2, 2, 4, 1, 0], jnp.int32)
    found = rl.ended(tokens, lengths, (stop, other_stop))
    np.testing.assert_array_equal(found, [True, True, False, False, True, False])
    np.testing.assert_array_equal(rl.ended(tokens, lengths, (stop,)), [True, False, False, False, True, False])
    scores = jnp.arange(6, dtype=jnp.int32)
    punished = rl.penalize_missing_end(scores, found, 1.5)
    assert punished.dtype == jnp.float32
    np.testing.assert_array_equal(punished, [0, 1, 0.5, 1.5, 4, 3.5])
    # A padding token that is the stop token too changes nothing: masks come from lengths.
    np.testing.assert_array_equal(rl.ended(jnp.where(tokens == 0, stop, tokens), lengths, (stop, other_stop)), found)


def test_scores_are_clipped_on_both_sides_in_float32() -> None:
    found = rl.clip_scores(jnp.asarray([-9.5, 0.25, 40.0, np.nan], jnp.bfloat16), 3.5)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [-3.5, 0.25, 3.5, np.nan])


def test_entropy_bonus_lowers_the_loss_of_a_flat_policy() -> None:
    mask = jnp.ones((1, 2), bool)
    zero = jnp.zeros((1, 2), jnp.float32)
    policy = rl.policy_loss(zero, zero, zero, mask, 0.2, 0.0, TOKENS)
    value = rl.value_loss(zero, zero, zero, mask, 0.2, TOKENS)

    def loss(logits: jax.Array) -> jax.Array:
        return rl.ppo_loss(policy, value, losses.entropy(logits, 1.0), mask, 0.5, 0.7, TOKENS)[0]

    np.testing.assert_allclose(loss(jnp.zeros((1, 2, 4), jnp.float32)), -0.7 * 2 * np.log(4), rtol=1e-6)
    peaked = jnp.zeros((1, 2, 4), jnp.float32).at[..., 1].set(2.0)
    assert (jax.grad(loss)(peaked)[..., 1] > 0).all(), "descent flattens the peak"


def test_padding_in_a_compiled_ppo_loss_makes_no_shape_of_its_own() -> None:
    """The same rows in a wider array give the same loss: nothing divides by an array's size."""
    arrays = [jnp.asarray(ragged(seed)) for seed in range(3)]
    wide = [jnp.pad(x, ((0, 0), (0, 4)), constant_values=jnp.nan) for x in arrays]
    found = rl.policy_loss(*wide, losses.length_mask(jnp.asarray(LENGTHS), 11), 0.2, 0.0, TOKENS)
    expected = rl.policy_loss(*arrays, jnp.asarray(MASK), 0.2, 0.0, TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
