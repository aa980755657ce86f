"""PPO's rollouts and updates, through the code that the stage runs."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig, OverOptimisationConfig, PpoConfig, PpoGuardsConfig
from almost_jax.core.heads import add_head, sequence_scores
from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.losses import length_mask
from almost_jax.core.partitioning import lowering_for
from almost_jax.core.rotary import RopeConfig
from almost_jax.errors import InputError, TrainingDiverged
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.models import load_model, save_model
from almost_jax.io.preemption import Preempted, stops_on_sigterm
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.sampling.engine import Request, Settings, generate
from almost_jax.sampling.rows import Samples, stacked
from almost_jax.sampling.rules import SamplingRules
from almost_jax.stages import reward, rlsf, rollouts, updates
from almost_jax.stages.actors import load_actors
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
    vocab_chunk=7,
)
EOS, HUMAN = 2, 3
PLAYERS = Players(
    policy=CONFIG,
    critic=CONFIG,
    reward=CONFIG,
    temperature=0.7,
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
    requests = [
        Request(str(row), tuple(prompts[row, : int(length)].tolist())) for row, length in enumerate(lengths)
    ]
    drawn = generate(policy, CONFIG, requests, rules, Settings(8, 4, True, 256), seed=3, prefix_tokens=())
    samples = jax.tree.map(jnp.asarray, stacked(list(drawn), 13, None, str))
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
    loss, (weight, metrics) = updates.ppo_loss_sums({"policy": policy, "critic": scored(5)}, batch, players, PPO)
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
        prompts, jnp.array([3, 5, 2, 3]), responses, jnp.array([1, 4, 1, 0]), EOS
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
        entropies=jnp.ones((4, 3), jnp.float32),
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
    _, (_, metrics) = updates.ppo_loss_sums({"policy": policy, "critic": scored(5)}, batch, players, PPO)
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


class Stopped(Exception):
    """What a kill looks like from inside."""


ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 0.05, "kl_horizon": 40, "kl_coef": 0.11}


def test_what_was_lost_beside_a_checkpoint_is_named(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    short = {"steps": 2, "sample_every": 1, "checkpoint_every": 1, "max_to_keep": 1}
    assert rlsf.run_stage(make_ppo(tmp_path, **short))["kl_coef"] > 0
    assert [path.name for path in (tmp_path / "rlsf" / "checkpoints").iterdir()] == ["2"]
    for lost in ("policies/1", "model"):
        shutil.rmtree(tmp_path / "rlsf" / lost)
    for lost in ("samples.jsonl", "metrics.jsonl"):
        (tmp_path / "rlsf" / lost).unlink()
    again = make_ppo(tmp_path, **short)
    assert "kl_coef" not in rlsf.run_stage(again)
    said = again.console.file.getvalue()  # type: ignore[attr-defined]
    assert "rlsf: policies lacks 1 of the steps so far" in said
    assert "rlsf: samples.jsonl lacks 1, 2 of the steps so far" in said and "rollouts.jsonl lacks" not in said
    assert again.path("rlsf", "model").exists()


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_20_28_stopped_and_resumed_is_the_same_to_the_byte_with_the_same_coefficient(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, trained: dict[str, Path]
) -> None:
    whole = make_ppo(tmp_path / "whole", **ADAPTIVE)
    if "rlsf" not in trained:
        rlsf.run_stage(whole)
        trained["rlsf"] = whole.path("rlsf")
    batch_indices = rlsf.batch_indices

    def stopping(step: int, *rest: Any) -> Any:
        if step == stop:
            raise Stopped
        return batch_indices(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(rlsf, "batch_indices", stopping)
        rlsf.run_stage(make_ppo(tmp_path / "stopped", **ADAPTIVE))
    resumed = make_ppo(tmp_path / "stopped", **ADAPTIVE)
    rlsf.run_stage(resumed)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (trained["rlsf"] / name).read_bytes() == resumed.path("rlsf", name).read_bytes()
    assert sorted(path.name for path in resumed.path("rlsf", "policies").iterdir()) == ["0", "2", "4"]
    for name in ("policies/0", "policies/2", "policies/4", "model"):
        ours, theirs = (
            load_model(str(folder / name), resumed.mesh, "float32")
            for folder in (trained["rlsf"], resumed.path("rlsf"))
        )
        for left, right in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            np.testing.assert_array_equal(left, right)
    lines = read_records(resumed.path("rlsf", "metrics.jsonl"))
    coefficients = [line["kl_coef"] for line in lines]
    assert coefficients[0] == pytest.approx(0.11) and len(set(coefficients)) == 4
    # Every coefficient follows from the line before it: error clipped to +-0.2, times batch size over horizon.
    for before, after in zip(lines, lines[1:], strict=False):
        error = min(max(before["kl"] / 0.05 - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 8 / 40), rel=1e-5)


def test_28_a_signal_while_a_step_is_sampled_does_not_wait_for_its_updates(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Path]
) -> None:
    if "rlsf" not in trained:
        whole = make_ppo(tmp_path / "whole", **ADAPTIVE)
        rlsf.run_stage(whole)
        trained["rlsf"] = whole.path("rlsf")
    collect, learn, learned = rlsf.collect, rlsf.learn, list[int]()

    def signalled(*arguments: Any) -> Any:
        if arguments[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(*arguments)

    def noted(*arguments: Any) -> Any:
        learned.append(arguments[4])
        return learn(*arguments)

    stopped = make_ppo(tmp_path / "stopped", **ADAPTIVE)
    with monkeypatch.context() as patch, pytest.raises(Preempted), stops_on_sigterm():
        patch.setattr(rlsf, "collect", signalled)
        patch.setattr(rlsf, "learn", noted)
        rlsf.run_stage(stopped)
    assert learned == [1], "the second step's updates were not waited for"
    assert "rlsf: asked to stop; step 1 is saved" in stopped.console.file.getvalue()  # type: ignore[attr-defined]
    resumed = make_ppo(tmp_path / "stopped", **ADAPTIVE)
    rlsf.run_stage(resumed)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (trained["rlsf"] / name).read_bytes() == resumed.path("rlsf", name).read_bytes()


def test_over_optimisation_is_ppo_with_another_penalty(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path)
    assert rlsf.run_over_optimised(run) == {"over_optimisation": "off"} and not run.path("over_optimisation").exists()
    weak = OverOptimisationConfig(kl_coef=0.0, steps=2, sample_every=1)
    guarded = run.config.ppo.model_copy(update={"guards": PpoGuardsConfig(max_kl=1e-9, min_entropy=1e9)})
    config = run.config.model_copy(update={"over_optimisation": weak, "ppo": guarded})
    straying = dataclasses.replace(run, config=config, directory=tmp_path / "straying")
    shutil.copytree(tmp_path, straying.directory, ignore=shutil.ignore_patterns("straying"))
    assert rlsf.run_over_optimised(straying)["steps"] == 2, "guards against straying don't stop it"
    run = dataclasses.replace(run, config=run.config.model_copy(update={"over_optimisation": weak}))
    assert rlsf.run_over_optimised(run)["steps"] == 2
    assert not run.path("rlsf").exists(), "it has a folder of its own"
    assert sorted(path.name for path in run.path("over_optimisation", "policies").iterdir()) == ["0", "1", "2"]
    weakly = read_records(run.path("over_optimisation", "metrics.jsonl"))
    # The penalty is gone, and what it would have held back is measured.
    assert [line["kl_coef"] for line in weakly] == [0.0, 0.0] and weakly[1]["kl"] != 0
    rlsf.run_stage(run)
    penalised = read_records(run.path("rlsf", "metrics.jsonl"))
    assert weakly[0]["reward"] == penalised[0]["reward"], "both begin with the same rollouts"
    assert weakly[1]["kl"] != penalised[1]["kl"], "and go different ways"


def test_a_step_changes_policy_and_critic_and_reports_what_happened(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_ppo(tmp_path)
    make_update, made = rlsf.make_update, []

    def remembering(*arguments: Any) -> Any:
        made.append(make_update(*arguments))
        return made[-1]

    monkeypatch.setattr(rlsf, "make_update", remembering)
    summary = rlsf.run_stage(run)
    assert [update._cache_size() for update in made] == [0, 1], "one program must do all updates"
    lines = read_records(run.path("rlsf", "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {
            "reward", "shaped_reward", "kl", "entropy", "clip_fraction", "value_loss", "explained_variance",
            "response_length", "missing_eos", "kl_coef", "learning_rate", "policy_loss", "approx_kl", "sampler_gap",
        } <= set(line)  # fmt: skip
        assert line["sampler_gap"] < 1e-4
        assert 1 <= line["response_length"] <= 9 and 0 <= line["missing_eos"] <= 1
    assert abs(lines[0]["kl"]) < 1e-5 and lines[3]["kl"] > 1e-4
    assert lines[0]["learning_rate"] == pytest.approx(3e-3)
    assert lines[0]["learning_rate"] > lines[3]["learning_rate"] > 0
    assert [line["kl_coef"] for line in lines] == pytest.approx([0.05] * 4)
    assert summary["kl"] == lines[3]["kl"] and summary["queries"] == 24
    start, source = (load_model(str(run.path(*name)), run.mesh, "float32") for name in (
        ("rlsf", "policies", "0"), ("sft", "model")
    ))
    for left, right in zip(jax.tree.leaves(start.params), jax.tree.leaves(source.params), strict=True):
        np.testing.assert_array_equal(left, right)
    final = load_model(str(run.path("rlsf", "model")), run.mesh, "float32")
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(
        jax.tree.leaves(final.params), jax.tree.leaves(source.params), strict=True
    ))
    samples = read_records(run.path("rlsf", "samples.jsonl"))
    assert [sample["step"] for sample in samples] == [1] * 8 + [2] * 8 + [4] * 8
    texts = {query["text"] for query in read_records(run.path("queries.jsonl"))}
    assert all(sample["query"] in texts and sample["finish"] in ("eos", "stop", "length") for sample in samples)
    assert not any(word in sample["response"] for sample in samples for word in ("<eos>", "<pad>", "Human:"))


def test_ppo_raises_the_reward_of_a_policy_that_can_get_it(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(
        tmp_path,
        steps=28,
        batch_size=32,
        kl_coef=0.0,
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        checkpoint_every=50,
        sample_every=50,
    )
    rlsf.run_stage(run)
    rewards = [line["reward"] for line in read_records(run.path("rlsf", "metrics.jsonl"))]
    std = load_model(str(run.path("reward", "model")), run.mesh, "float32").reward_std
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3 * std


def test_every_epoch_of_every_step_takes_all_rows_in_an_order_of_its_own(
    make_ppo: Callable[..., Run], tmp_path: Path
) -> None:
    run, taken = make_ppo(tmp_path, num_ppo_epochs=3, num_mini_batches=2), list[list[int]]()

    def update(state: Any, learned: Any, rows: Any) -> Any:
        taken.append(rows.tolist())
        return state, {"too_far": 0.0}

    learned: Any = SimpleNamespace(tokens=np.zeros((8, 2)))
    state: Any = None
    for step in (1, 2):
        rlsf.updated(run, state, learned, step, update)
    orders = [(*taken[place], *taken[place + 1]) for place in range(0, 12, 2)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(orders)) == 6 and tuple(range(8)) not in orders


def test_critic_warm_up_leaves_the_policy_alone(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path, critic_warmup_steps=2, critic="sft", steps=3, kl_controller="adaptive", kl_horizon=100)
    rlsf.run_stage(run)
    lines = read_records(run.path("rlsf", "metrics.jsonl"))
    assert [line["learning_rate"] > 0 for line in lines] == [False, False, True]
    assert [abs(line["kl"]) < 1e-5 for line in lines] == [True, True, True]
    # An adaptive coefficient would fall while the KL is 0.
    assert [line["kl_coef"] for line in lines] == [pytest.approx(run.config.ppo.kl_coef)] * 3
    # A zero head predicts 0 at first.
    actors = load_actors(run)
    state = rlsf.start_state(run, actors, *rlsf.make_optimizers(run.config.ppo))
    assert not np.asarray(state.critic.params["score"]["kernel"]).any()
    assert lines[0]["value_loss"] > 0 and "policy_grad_norm" not in lines[0] and "policy_grad_norm" in lines[2]
    before, after, final = (
        load_model(str(run.path("rlsf", name)), run.mesh, "float32").params
        for name in ("policies/0", "policies/2", "model")
    )
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(final), strict=True
    ))


def test_critic_from_the_reward_model_starts_as_the_reward_model(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path)
    actors = rlsf.load_actors(run)
    state = rlsf.start_state(run, actors, *rlsf.make_optimizers(run.config.ppo))
    np.testing.assert_array_equal(state.critic.params["score"]["kernel"], actors.reward.params["score"]["kernel"])
    # Read at the last token of a text its value is the normalised score.
    tokens = jnp.array([dialogues_tokens(actors)], jnp.int32)
    value = rollouts.response_values(state.critic.params, actors.players, tokens, jnp.array([tokens.shape[1]]), 1)
    expected = reward.RewardScorer(actors.reward, 1, print).score_tokens(tokens.tolist())
    assert float(value[0, 0]) == pytest.approx(float(expected[0]), abs=1e-5)


def test_critic_from_the_sft_model_starts_with_a_zero_head(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    run = make_ppo(tmp_path, critic="sft")
    actors = rlsf.load_actors(run)
    state = rlsf.start_state(run, actors, *rlsf.make_optimizers(run.config.ppo))
    assert not state.critic.params["score"]["kernel"].any()
    body = {name: tree for name, tree in state.critic.params.items() if name != "score"}
    jax.tree.map(np.testing.assert_array_equal, body, actors.sft.params)


def test_policy_and_critic_have_learning_rates_of_their_own() -> None:
    ppo = PpoConfig.model_validate(
        {"optimizer": {"learning_rate": 3e-4, "schedule": "linear"}, "value_learning_rate": 2e-2, "steps": 5,
         "num_ppo_epochs": 1, "critic_warmup_steps": 1}
    )  # fmt: skip
    params = {"kernel": jnp.ones((3,))}
    # Adam's step for gradients that stay the same is the learning rate, which goes down over the run's updates.
    for optimizer, rate, total in zip(rlsf.make_optimizers(ppo), (3e-4, 2e-2), (4, 5), strict=True):
        state = optimizer.init(params)
        for place in range(total):
            with jax.numpy_dtype_promotion("standard"):
                change, state = optimizer.update({"kernel": jnp.full((3,), 0.1)}, state, params)
            np.testing.assert_allclose(change["kernel"], -rate * (1 - place / total), rtol=1e-4)


def dialogues_tokens(actors: rlsf.Actors) -> list[int]:
    return reward.dialogue_tokens(
        actors.sft.tokenizer, [{"role": "human", "text": "what is red"}, {"role": "assistant", "text": "a bird"}]
    )


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_16_rollouts_are_judged_by_the_attention_of_the_updates_on_a_tpu_too(
    make_ppo: Callable[..., Run], tmp_path: Path, devices: int, explicit: bool
) -> None:
    settings = MeshConfig(fsdp=2 if devices == 2 else 1, data=1)
    run = make_ppo(tmp_path, mesh=settings, devices=devices)
    settings = settings.model_copy(update={"explicit": explicit, "vocab_chunk": 7})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"mesh": settings}))
    with lowering_for("tpu"):
        judging = rlsf.load_actors(run).players
        learning = rlsf.training_players(judging, settings, run.mesh)
    assert judging.policy.attention == ("splash" if devices == 1 else "plain")
    # Explicit FSDP gathers weights as it goes, and nothing else is different.
    for name in ("policy", "critic"):
        ours, theirs = getattr(judging, name), getattr(learning, name)
        assert ours == dataclasses.replace(theirs, gather=None), name
    assert judging.reward == learning.reward


@pytest.mark.parametrize("explicit", [False, True])
def test_05_ppo_is_the_same_on_four_devices(make_ppo: Callable[..., Run], tmp_path: Path, explicit: bool) -> None:
    mesh = MeshConfig(data=2, fsdp=2, explicit=explicit)
    runs = [make_ppo(tmp_path / "one", steps=2), make_ppo(tmp_path / "four", steps=2, mesh=mesh, devices=4)]
    lines = []
    for run in runs:
        rlsf.run_stage(run)
        lines.append(read_records(run.path("rlsf", "metrics.jsonl")))
    for left, right in zip(*lines, strict=True):
        assert left.keys() == right.keys()
        for name in ("reward", "kl", "value_loss", "entropy", "response_length", "policy_grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=2e-3, abs=2e-4), name


def test_divergence_names_the_step_and_the_last_good_checkpoint(
    make_ppo: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_ppo(tmp_path)
    experience = rlsf.experience
    calls: list[int] = []

    def poisoned(judged: Any, *rest: Any) -> Any:
        calls.append(1)
        return experience(judged.replace(scores=judged.scores * (np.nan if len(calls) == 3 else 1.0)), *rest)

    monkeypatch.setattr(rlsf, "experience", poisoned)
    with pytest.raises(TrainingDiverged, match=r"rlsf: diverged at step 3: .*reward is nan.*good checkpoint is step 2"):
        rlsf.run_stage(run)
    assert Checkpoints(run.path("rlsf", "checkpoints"), 2).steps() == [2]
    assert json.loads(run.path("rlsf", "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_what_cannot_work_is_refused_in_one_line(make_ppo: Callable[..., Run], tmp_path: Path) -> None:
    short = make_ppo(tmp_path / "short", max_prompt_length=3)
    with pytest.raises(InputError, match=r"ppo\.max_prompt_length: none of 24 queries fits into 3 tokens"):
        rlsf.run_stage(short)
    long = make_ppo(tmp_path / "long", sampling={"temperature": 1.0, "max_new_tokens": 120})
    with pytest.raises(InputError, match="exceed the 128 positions"):
        rlsf.run_stage(long)
    other = make_ppo(tmp_path / "other")
    policy = load_model(str(other.path("sft", "model")), other.mesh, "float32")
    shutil.rmtree(other.path("reward", "model"))
    save_model(other.path("reward", "model"), policy)
    with pytest.raises(InputError, match="is a policy; expected a reward model"):
        rlsf.run_stage(other)
