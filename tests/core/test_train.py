"""Schedules, the optimizer, gradient accumulation over ragged micro-batches, and the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import OptimizerConfig
from almost_jax.core import heads, llama, losses, rl
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.train import (
    Batch,
    accumulate_gradients,
    apply_gradients,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)

LENGTHS = np.array([7, 1, 2, 6, 1, 5, 7, 3], np.int32)


def rates(config: OptimizerConfig, total: int, steps: list[int]) -> list[float]:
    schedule = learning_rate_schedule(config, total)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    "schedule, after",
    [
        ("constant", [0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.5, 0.2, 0.2]),
        ("cosine", [0.8, 0.5, 0.2, 0.2]),
    ],
)
def test_schedules_at_their_corners(schedule: str, after: list[float]) -> None:
    """Peak 0.8, final 0.2, warm-up over 4 of 24 steps: start, middle of it; then peak, half-way, end, beyond."""
    config = OptimizerConfig.model_validate(
        {"learning_rate": 0.8, "schedule": schedule, "warmup_steps": 4, "final_fraction": 0.25}
    )
    found = rates(config, 24, [0, 2, 4, 14, 24, 99])
    np.testing.assert_allclose(found, [0.0, 0.4, *after], rtol=1e-6)


def test_schedules_between_their_corners_and_without_warmup() -> None:
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear")
    np.testing.assert_allclose(rates(linear, 8, [0, 2, 8]), [1, 0.75, 0], atol=1e-7)
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    np.testing.assert_allclose(rates(cosine, 8, [0, 2, 8]), [1, 0.5 * (1 + np.cos(np.pi / 4)), 0], atol=1e-7)
    only_warmup = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=4)
    assert np.isfinite(rates(only_warmup, 3, [0, 3, 4, 9])).all()


def test_optimizer_equals_adamw_behind_clipping_in_numpy() -> None:
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", b1=0.7, b2=0.8, eps=1e-3, weight_decay=0.05, max_grad_norm=1.5
    )
    optimizer = make_optimizer(config, 10)
    weights = {"kernel": np.array([1.0, -2.0]), "scale": np.array([0.5])}
    state = init_state({name: jnp.asarray(x, jnp.float32) for name, x in weights.items()}, optimizer)
    first, second = ({name: np.zeros_like(x) for name, x in weights.items()} for _ in range(2))
    gradients = [{"kernel": np.array([3.0, 4.0]), "scale": np.array([0.0])}] + [
        {"kernel": np.array([0.2, -0.1]), "scale": np.array([0.3])}
    ] * 2
    for step, gradient in enumerate(gradients, 1):
        state = apply_gradients(state, {n: jnp.asarray(g, jnp.float32) for n, g in gradient.items()}, optimizer)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, 1.5 / norm)
            first[name] = 0.7 * first[name] + 0.3 * g
            second[name] = 0.8 * second[name] + 0.2 * g**2
            update = first[name] / (1 - 0.7**step) / (np.sqrt(second[name] / (1 - 0.8**step)) + 1e-3)
            weights[name] = weights[name] - 0.1 * (update + (0.05 * weights[name] if name == "kernel" else 0))
    assert state.step == 3
    for name, x in weights.items():
        np.testing.assert_allclose(state.params[name], x, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_weight_decay_reaches_matrices_and_spares_norms_and_the_head(
    tiny: LlamaConfig, make_params: Callable[[LlamaConfig, int], Params], scan: bool, nested: bool
) -> None:
    params = heads.add_head(make_params(tiny, 0), tiny, jax.random.key(1), stddev=1.0)
    if not scan:
        params = llama.unstack_layers(params, tiny.num_layers)
    if nested:
        params = {"policy": {k: v for k, v in params.items() if k != "score"}, "critic": params}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.1), 5)
    state = apply_gradients(init_state(params, optimizer), jax.tree.map(jnp.zeros_like, params), optimizer)
    seen = set()
    for (path, before), after in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(state.params), strict=True
    ):
        name = jax.tree_util.keystr(path)
        spared = "scale" in name or "score" in name
        seen.add(spared)
        np.testing.assert_allclose(after, np.asarray(before) * (1.0 if spared else 0.95), rtol=1e-6, err_msg=name)
    assert seen == {True, False}


def ppo_batch() -> Batch:
    rng = np.random.default_rng(3)
    names = ["old_logprobs", "advantages", "old_values", "returns"]
    arrays = {name: jnp.asarray(rng.normal(size=(8, 7)) - 2 * (name == "old_logprobs"), jnp.float32) for name in names}
    tokens = jnp.asarray(rng.integers(0, 37, (8, 7)), jnp.int32)
    return {"tokens": tokens, "lengths": jnp.asarray(LENGTHS), **arrays}


def ppo_sums(config: LlamaConfig) -> Callable[[Params, Batch], losses.LossTerms]:
    def sums(params: Params, batch: Batch) -> losses.LossTerms:
        mask = losses.length_mask(batch["lengths"], 7)
        logits = llama.logits(params, config, llama.hidden_states(params, config, batch["tokens"]))
        logprobs = losses.next_token_logprobs(logits, batch["tokens"], 0.8)
        values = heads.token_scores(params, config, batch["tokens"])
        policy = rl.policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, 0.2, 0.0, "token_mean")
        value = rl.value_loss(values, batch["old_values"], batch["returns"], mask, 0.2, "token_mean")
        return rl.ppo_loss(policy, value, losses.entropy(logits, 0.8), mask, 0.4, 0.02, "token_mean")

    return sums


def sft_sums(config: LlamaConfig) -> Callable[[Params, Batch], losses.LossTerms]:
    def sums(params: Params, batch: Batch) -> losses.LossTerms:
        logits = llama.logits(params, config, llama.hidden_states(params, config, batch["tokens"]))
        return losses.cross_entropy_sums(logits, batch["tokens"], losses.length_mask(batch["lengths"], 7))

    return sums


@pytest.mark.parametrize("make_sums", [sft_sums, ppo_sums])
def test_22_accumulation_over_ragged_micro_batches_equals_one_batch(
    tiny: LlamaConfig,
    make_params: Callable[[LlamaConfig, int], Params],
    make_sums: Callable[[LlamaConfig], Callable[[Params, Batch], losses.LossTerms]],
) -> None:
    params = heads.add_head(make_params(tiny, 4), tiny, jax.random.key(4), stddev=0.5)
    sums, batch = make_sums(tiny), ppo_batch()
    run = jax.jit(lambda p, b, n: accumulate_gradients(sums, p, b, n), static_argnums=2)

    def mean_loss(params: Params) -> jax.Array:
        total, (count, _) = sums(params, batch)
        return total / count

    loss, expected = jax.jit(jax.value_and_grad(mean_loss))(params)
    _, whole = run(params, batch, 1)
    np.testing.assert_allclose(whole["loss"], loss, rtol=1e-5)
    for micro_batches in (1, 2, 8):
        grads, metrics = run(params, batch, micro_batches)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), grads, expected)
        assert set(metrics) == set(whole)
        for name in metrics:
            np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-5, atol=1e-6)


def test_22_metrics_are_weighted_by_their_own_counts_not_averaged_over_parts() -> None:
    def sums(params: Params, batch: Batch) -> losses.LossTerms:
        mask = losses.length_mask(batch["lengths"], 7)
        x = batch["advantages"]
        odd = mask & (x > 0)
        total = losses.masked_sum(x * params["kernel"], mask)
        return total, (losses.count(mask), {"positive": (losses.masked_sum(x, odd), losses.count(odd))})

    batch = ppo_batch()
    x = np.asarray(batch["advantages"])[np.arange(7)[None] < LENGTHS[:, None]]
    for micro_batches in (1, 4):
        grads, metrics = accumulate_gradients(sums, {"kernel": jnp.float32(2)}, batch, micro_batches)
        np.testing.assert_allclose(metrics["loss"], 2 * x.mean(), rtol=1e-5)
        np.testing.assert_allclose(grads["kernel"], x.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["positive"], x[x > 0].mean(), rtol=1e-5)


def test_22_gradients_of_bfloat16_parameters_are_added_in_float32() -> None:
    def sums(params: Params, batch: Batch) -> losses.LossTerms:
        return (params["kernel"].astype(jnp.float32) * batch["x"]).sum(), (jnp.float32(1), {})

    batch = {"x": jnp.asarray([256.0, 1.0, 1.0, 1.0], jnp.float32)}
    grads, _ = accumulate_gradients(sums, {"kernel": jnp.ones((), jnp.bfloat16)}, batch, 4)
    assert grads["kernel"].dtype == jnp.float32
    assert grads["kernel"] == 259 / 4, "a number that bfloat16 does not have"


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 8 can't be split into 3 micro-batches"):
        accumulate_gradients(sft_sums, {}, ppo_batch(), 3)  # type: ignore[arg-type]


def test_a_step_updates_counts_and_reports_the_norm_before_clipping() -> None:
    def sums(params: Params, batch: Batch) -> losses.LossTerms:
        return (params["kernel"][None, :] * batch["x"]).sum(), (jnp.float32(batch["x"].shape[0]), {})

    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule="constant", max_grad_norm=0.5), 3)
    step = make_train_step(sums, optimizer)
    start = jnp.asarray([1.0, 1.0], jnp.float32)
    state = init_state({"kernel": start}, optimizer)
    state, metrics = step(state, {"x": jnp.asarray([[3.0, 4.0], [3.0, 4.0]], jnp.float32)})
    assert state.step == 1 and start.is_deleted(), "the state's memory is donated"
    np.testing.assert_allclose(metrics["grad_norm"], 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 7, rtol=1e-6)
    np.testing.assert_allclose(state.params["kernel"], [0.9, 0.9], rtol=1e-5)
