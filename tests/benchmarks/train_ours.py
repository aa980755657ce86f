"""Worker: our SFT and reward model steps and a whole PPO iteration, by the functions that the stages run."""

import contextlib
import dataclasses
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import ROOT, serve
from rich.console import Console
from training_tasks import (
    B1,
    B2,
    CALLS,
    DRAWS,
    EPS,
    HEAD_STDDEV,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PACKED_LENGTH,
    STEPS_PER_CALL,
    TIMED,
    WEIGHT_DECAY,
    Sizes,
    head,
    rewarded,
    sizes,
    windows,
)

from almost_jax.config import MeshConfig, OptimizerConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.train import make_optimizer, make_train_step
from almost_jax.experiments import load_experiment
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages import rlsf
from almost_jax.stages.execution import training_shape
from almost_jax.stages.pair_rows import PairTokens, TwoTexts, packed_rows, pair_batch, pair_loss_sums
from almost_jax.stages.sft import sft_loss_sums
from almost_jax.stages.training import fresh_state, place_batch, place_batches, shardings_of

# The first iteration compiles.
WARMING = 1
# What a PPO iteration calls, by the names under which `rlsf` knows it; updates are made by its `make_update`.
PHASES = {"rollout": "draw", "judging": "judge", "advantages": "experience"}


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
    """Steps of `make_train_step`, the batch's way to the device and the loss's way back included.

    One by one, and where all batches are of one shape then several by one call too (`steps_per_call`).
    """
    size, settings = sizes(spec["quick"]), MeshConfig()
    mesh = make_mesh(settings)
    model = load_model(spec["model"], mesh, spec["dtype"])
    shape = training_shape(model.config, settings, mesh)
    text = np.load(spec["text"])
    if spec["task"] == "sft":
        tokens = windows(text, size.rows, size.tokens)
        batch = {"tokens": tokens, "targets": np.ones(tokens.shape, bool)}
        warming, batches = [batch] * 2, [batch] * size.steps
        loss_sums: Callable[..., Any] = functools.partial(sft_loss_sums, config=shape, z_loss=0.0)
        params = model.params
    else:
        warming, batches = reward_batches(spec["task"], text, size, shape.attention != "splash")
        loss_sums = functools.partial(pair_loss_sums, config=shape, margin=0.0, centering=0.0)
        params = with_head(model)
    optimizer = make_optimizer(optimizer_config(), 1000)
    losses: list[float] = []

    def timed(step: Any, placed: Callable[[], Any]) -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, placed())
        losses.extend(np.asarray(metrics["loss"]).ravel().tolist())
        jax.block_until_ready(state)
        return time.perf_counter() - start

    with jax.set_mesh(mesh):
        state = fresh_state(params, optimizer, mesh)
        del model, params
        make = functools.partial(make_train_step, loss_sums, optimizer, 1, shardings_of(state), None)
        one = make()
        seconds = [
            timed(one, functools.partial(place_batch, batch, mesh))
            for batch in [*warming, *batches * spec["repeats"]]
        ]
        found = {"first_seconds": seconds[0], "second_seconds": seconds[1], "losses": losses}
        found["seconds"] = seconds[len(warming) :]
        if spec["task"] != "pairs":
            several, together = make(several=True), [batches[0]] * STEPS_PER_CALL
            calls = [
                timed(several, functools.partial(place_batches, together, mesh))
                for _ in range(1 + CALLS * spec["repeats"])
            ]
            found |= {
                "one_by_one": found["seconds"],
                "first_call_seconds": calls[0],
                "seconds": [call / STEPS_PER_CALL for call in calls[1:]],
            }
    return found


def reward_batches(
    task: str, text: np.ndarray, size: Sizes, share: bool
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Batches of the steps that compile and of the timed ones."""

    def pairs_at(step: int) -> list[TwoTexts]:
        texts = [row[:length].tolist() for row, length in zip(*rewarded(task, text, size, step), strict=True)]
        return list(zip(texts[: len(texts) // 2], texts[len(texts) // 2 :], strict=True))

    if task == "reward":
        batch = pair_batch(pairs_at(0), size.tokens, 0)
        return [batch] * 2, [batch] * size.steps

    def marked(step: int) -> list[PairTokens]:
        return [PairTokens.scored(*pair) for pair in pairs_at(step)]

    packed, _ = packed_rows(marked, DRAWS, PACKED_LENGTH, 1, share)
    first = packed.batch(marked(0), 0)
    # Each program twice: that of the first pairs, and the one of another number of rows, if there is one.
    others = [dataclasses.replace(packed, rows=(rows,)) for rows in packed.rows if rows != len(first["tokens"])]
    warming = [first] * 2 + [other.batch(marked(0)[:1], 0) for other in others] * 2
    return warming, [packed.batch(marked(1 + step), 0) for step in range(TIMED)]


def overrides(spec: dict[str, Any]) -> list[str]:
    """The PPO section of an experiment, at the benchmark's sizes."""
    size = sizes(spec["quick"])
    values: dict[str, Any] = {
        "steps": 100,
        "batch_size": size.prompts,
        "num_ppo_epochs": size.epochs,
        "num_mini_batches": 1,
        "micro_batches": size.micro_batches,
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
        "sample_every": 100,
        "checkpoint_every": 100,
    }
    return [f"ppo.{name}={value}" for name, value in values.items()] + [f"compute_dtype={spec['dtype']}"]


class Enough(Exception):
    """As many iterations as are measured are done."""


class Clock:
    """When each step of a stage ended, and how long its parts took."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []
        self.phases: list[dict[str, float]] = [{}]

    def step_ended(self, *_: Any) -> None:
        """The stage's progress hook."""
        self.ends.append(time.perf_counter())
        self.phases.append({})
        if len(self.ends) == self.steps:
            raise Enough

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, waiting for its result; its time is added to the phase."""

        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = jax.block_until_ready(call(*given, **named))
            own = self.phases[-1]
            own[phase] = own.get(phase, 0.0) + time.perf_counter() - start
            return found

        return run


def write_inputs(run: Run, spec: dict[str, Any], prompts: int) -> None:
    """What the stage reads: an SFT model, a reward model with everyone's head, and demonstrations."""
    sft = load_model(spec["model"], run.mesh, spec["dtype"])
    save_model(run.path("sft", "model"), sft)
    # The moments only scale scores; any standard deviation above 0 costs the same.
    reward = dataclasses.replace(sft, params=with_head(sft), kind="reward", reward_mean=0.0, reward_std=HEAD_STDDEV)
    save_model(run.path("reward", "model"), reward)
    turns = [{"role": "human", "text": "word " * (1 + place)} for place in range(prompts)]
    write_records(run.path("demonstrations.jsonl"), [{"turns": [turn]} for turn in turns])


def ppo(spec: dict[str, Any]) -> dict[str, Any]:
    """The RLSF stage as `almost-jax run` runs it, but for prompts of one length and no stop tokens."""
    size = sizes(spec["quick"])
    config = load_experiment(ROOT / "experiments" / "microworld.yaml", overrides(spec))
    clock = Clock(WARMING + spec["repeats"])
    folder = Path(tempfile.mkdtemp(dir=spec["work"]))
    run = Run(folder, config, make_mesh(config.mesh), False, Console(file=sys.stderr), clock.step_ended)
    write_inputs(run, spec, size.prompts)
    rows = windows(np.load(spec["text"]), size.prompts, size.prompt_tokens)
    load_actors, load_prompts, make_update = rlsf.load_actors, rlsf.load_prompts, rlsf.make_update

    def actors(*given: Any) -> Any:
        found = load_actors(*given)
        rules = dataclasses.replace(found.rules, stop_tokens=())
        return dataclasses.replace(found, rules=rules, stops=None)

    def prompts(*given: Any) -> Any:
        lengths = np.full(size.prompts, size.prompt_tokens, np.int32)
        return dataclasses.replace(load_prompts(*given), tokens=rows, lengths=lengths)

    rlsf.load_actors, rlsf.load_prompts, rlsf.save_policy = actors, prompts, lambda *_: None
    for phase, name in PHASES.items():
        setattr(rlsf, name, clock.timed(phase, getattr(rlsf, name)))
    rlsf.make_update = lambda *given: clock.timed("updates", make_update(*given))
    start = time.perf_counter()
    with contextlib.suppress(Enough):
        rlsf.run_stage(run)
    figures = read_records(run.path("rlsf", "metrics.jsonl"))
    assert all(step["response_length"] == size.new_tokens for step in figures), "a rollout ended early"
    seconds = np.diff([start, *clock.ends]).tolist()
    shutil.rmtree(folder)
    phases = clock.phases[WARMING + spec["repeats"] - 1]
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[WARMING:],
        "phases": {**phases, "rest": seconds[-1] - sum(phases.values())},
    }


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the task."""
    return ppo(spec) if spec["task"] == "ppo" else supervised(spec)


if __name__ == "__main__":
    serve(main)
