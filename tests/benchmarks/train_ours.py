"""Worker: our SFT and reward model steps and a whole PPO iteration, by the functions that the stages run."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import ROOT, serve
from rich.console import Console
from training_tasks import B1, B2, EPS, HEAD_STDDEV, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, head, sizes, windows

from almost_jax.config import MeshConfig, OptimizerConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.train import make_optimizer, make_train_step
from almost_jax.experiments import load_experiment
from almost_jax.io.models import Model, load_model
from almost_jax.io.run import Run
from almost_jax.sampling.rules import SamplingRules
from almost_jax.stages import rlsf
from almost_jax.stages.execution import training_shape
from almost_jax.stages.reward import pair_loss_sums
from almost_jax.stages.rollouts import Players
from almost_jax.stages.sft import sft_loss_sums
from almost_jax.stages.training import fresh_state, place_batch, shardings_of
from almost_jax.stages.updates import make_optimizers, make_update

ITERATIONS = 3
# What a PPO step calls, by the names under which `rlsf` knows it.
PHASES = {"rollout": "sample", "judging": "judge", "advantages": "experience"}


def optimizer_config() -> OptimizerConfig:
    """AdamW behind clipping, as everyone's."""
    return OptimizerConfig(
        learning_rate=LEARNING_RATE,
        schedule="constant",
        b1=B1,
        b2=B2,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
    )


def with_head(model: Model) -> dict[str, Any]:
    """The model's tree with everyone's head."""
    return {**model.params, "score": {"kernel": jnp.asarray(head(model.config.hidden_size))}}


def supervised(spec: dict[str, Any]) -> dict[str, Any]:
    """Steps of `make_train_step`, the batch's way to the device and the loss's way back included."""
    size, settings = sizes(spec["quick"]), MeshConfig()
    mesh = make_mesh(settings)
    model = load_model(spec["model"], mesh, "float32")
    shape = training_shape(model.config, settings, mesh)
    text = np.load(spec["text"])
    if spec["task"] == "sft":
        tokens = windows(text, size.rows, size.tokens)
        batch = {"tokens": tokens, "targets": np.ones(tokens.shape, bool)}
        loss_sums: Callable[..., Any] = functools.partial(sft_loss_sums, config=shape)
        params = model.params
    else:
        tokens = windows(text, 2 * size.rows, size.tokens).reshape(2, size.rows, size.tokens).swapaxes(0, 1)
        batch = {"tokens": tokens, "lengths": np.full((size.rows, 2), size.tokens, np.int32)}
        loss_sums = functools.partial(pair_loss_sums, config=shape, margin=0.0, centering=0.0)
        params = with_head(model)
    optimizer = make_optimizer(optimizer_config(), 1000)
    losses, seconds = [], []
    with jax.set_mesh(mesh):
        state = fresh_state(params, optimizer, mesh)
        del model, params
        step = make_train_step(loss_sums, optimizer, 1, shardings_of(state), None)
        for _ in range(2 + size.steps):
            start = time.perf_counter()
            state, metrics = step(state, place_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
    return {"first_seconds": seconds[0], "second_seconds": seconds[1], "seconds": seconds[2:], "losses": losses}


def overrides(spec: dict[str, Any]) -> list[str]:
    """The PPO section of an experiment, at the benchmark's sizes."""
    size = sizes(spec["quick"])
    values: dict[str, Any] = {
        "steps": 100,
        "batch_size": size.prompts,
        "num_ppo_epochs": size.epochs,
        "num_mini_batches": 1,
        "micro_batches": 1,
        "max_prompt_length": size.prompt_tokens,
        "sampling.max_new_tokens": size.new_tokens,
        "sampling.batch_size": size.prompts,
        "kl_coef": 0.04,
        "value_learning_rate": LEARNING_RATE,
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "missing_eos_penalty": 0.0,
    }
    return [f"ppo.{name}={value}" for name, value in values.items()]


@contextlib.contextmanager
def timed_phases(seconds: dict[str, float]) -> Iterator[None]:
    """Make the parts of a PPO step wait for their results, and add up how long each took."""

    def timing(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = jax.block_until_ready(call(*given, **named))
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
            return found

        return run

    kept = {name: getattr(rlsf, name) for name in PHASES.values()}
    for phase, name in PHASES.items():
        setattr(rlsf, name, timing(phase, kept[name]))
    try:
        yield
    finally:
        for name, call in kept.items():
            setattr(rlsf, name, call)


def ppo(spec: dict[str, Any]) -> dict[str, Any]:
    """Iterations of `rlsf.ppo_step`; then one more, part by part."""
    size = sizes(spec["quick"])
    config = load_experiment(ROOT / "experiments" / "microworld.yaml", overrides(spec))
    run = Run(Path(spec["work"]), config, make_mesh(config.mesh), False, Console(file=sys.stderr))
    rows = windows(np.load(spec["text"]), size.prompts, size.prompt_tokens)
    with jax.set_mesh(run.mesh):
        sft = load_model(spec["model"], run.mesh, "float32")
        reward = load_model(spec["model"], run.mesh, "float32")
        # The moments only scale scores; any standard deviation above 0 costs the same.
        reward = Model(reward.config, with_head(reward), reward.tokenizer, "reward", "head", 0.0, HEAD_STDDEV)
        rules = SamplingRules(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=size.new_tokens, stop_tokens=())
        players = Players(
            policy=sft.config,
            critic=reward.config,
            reward=reward.config,
            temperature=1.0,
            stop_tokens=(),
            eos_id=sft.tokenizer.eos_id,
            reward_mean=reward.reward_mean,
            reward_std=reward.reward_std,
            value_shift=reward.reward_mean,
            value_scale=reward.reward_std,
        )
        actors = rlsf.Actors(sft, reward, players, rules)
        prompts = rlsf.Prompts([""] * size.prompts, rows, np.full(size.prompts, size.prompt_tokens, np.int32))
        optimizers = make_optimizers(config.ppo)
        state = rlsf.start_state(run, actors, *optimizers)
        learners = rlsf.training_players(players, config.mesh, run.mesh)
        update = make_update(learners, config.ppo, *optimizers, True, shardings_of(state), None)
        seconds = []

        def iterate(state: Any, step: int, update: Any) -> tuple[Any, float]:
            start = time.perf_counter()
            state, samples, figures = rlsf.ppo_step(run, state, actors, prompts, np.arange(size.prompts), step, update)
            jax.device_get((samples, figures))
            jax.block_until_ready(state)
            assert int(samples.lengths.sum()) == size.prompts * size.new_tokens
            return state, time.perf_counter() - start

        for number in range(ITERATIONS):
            state, elapsed = iterate(state, 1 + number, update)
            seconds.append(elapsed)
        phases: dict[str, float] = {}
        update_seconds: list[float] = []

        def timed_update(*given: Any) -> Any:
            start = time.perf_counter()
            found = jax.block_until_ready(update(*given))
            update_seconds.append(time.perf_counter() - start)
            return found

        with timed_phases(phases):
            _, whole = iterate(state, 1 + ITERATIONS, timed_update)
    phases["updates"] = sum(update_seconds)
    phases["rest"] = whole - sum(phases.values())
    return {
        "first_seconds": seconds[0],
        "second_seconds": seconds[1],
        "seconds": seconds[2:],
        "phases": phases,
        "updates": len(update_seconds),
    }


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the task."""
    return ppo(spec) if spec["task"] == "ppo" else supervised(spec)


if __name__ == "__main__":
    serve(main)
