"""Reinforcement learning from synthetic feedback: PPO from the SFT policy against the reward model.

A step: sample responses to a batch of the demonstrations' queries, score them, spread score and KL penalty over
tokens, estimate advantages, update policy and critic on mini-batches. Source: ALMoST (arXiv 2305.13735), section 2.4;
Schulman et al. 2017; Ziegler et al. 2019; details after Huang et al., "The N Implementation Details of RLHF with PPO",
2023.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from almost_jax.config import OverOptimisationConfig, PpoConfig
from almost_jax.core.heads import add_head
from almost_jax.core.losses import length_mask
from almost_jax.core.partitioning import batch_sharding, replicated
from almost_jax.io.batches import batch_indices, epoch_order
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.models import Model, is_complete, save_model
from almost_jax.io.preemption import asked_to_stop, saves_first
from almost_jax.io.records import Record, read_records, write_records
from almost_jax.io.run import Run
from almost_jax.sampling.engine import Request, generate
from almost_jax.sampling.rows import Samples, stacked
from almost_jax.stages.actors import (
    Actors,
    Prompts,
    check_positions,
    frozen,
    load_actors,
    load_prompts,
    training_players,
)
from almost_jax.stages.execution import placed_for_training, training_spread
from almost_jax.stages.guards import Guard, acts, fetched, rollout_problems, update_problems
from almost_jax.stages.prompting import engine_settings
from almost_jax.stages.rollout_tables import records_until, rollout_records, sample_records
from almost_jax.stages.rollouts import Experience, Rollouts, experience, judge
from almost_jax.stages.training import (
    LOGGED,
    checkpoint_folder,
    fresh_or_restored,
    fresh_state,
    kept_beside,
    place_batch,
    say_of_warmup,
    shardings_of,
    stop_if_asked,
)
from almost_jax.stages.updates import (
    PpoState,
    Update,
    make_optimizers,
    make_update,
    mean_figures,
    next_kl_coef,
    policy_learning_rate,
    policy_updates,
)

NAME = "rlsf"
# What a run with too weak a penalty has of its own, whatever these keys of `ppo` say.
OVER_OPTIMISED = (
    *OverOptimisationConfig.model_fields,
    *("kl_controller", "kl_target", "kl_horizon", "keep_reference"),
    *(f"guards.{key}" for key in ("kl", "max_kl", "entropy", "min_entropy")),
)
# What people read, by file; written together.
TABLES: dict[str, Callable[..., list[Record]]] = {"samples.jsonl": sample_records, "rollouts.jsonl": rollout_records}


@struct.dataclass
class Gathered:
    """A step's samples, and everything known of them before any update."""

    samples: Samples
    rollouts: Rollouts


def run_stage(run: Run, name: str = NAME) -> dict[str, Any]:
    """Train by PPO: sft/model, reward/model, demonstrations.jsonl -> rlsf/model, policies/STEP, samples, rollouts.

    Another `name` is another folder; the seeds, and so the rollouts of the first step, stay the same.

    Stopped and resumed, it leaves the same bytes as if it had never stopped: all randomness is a function of seed and
    step, and the checkpoint holds the rest: the KL coefficient, and rollouts that were sampled ahead.

    Raises:
        InputError: the models don't fit together, or a config value can't work.
        TrainingDiverged: a guard stopped it, see `ppo.guards`.
        Preempted: SIGTERM came; the state is saved.
    """
    ppo = run.config.ppo
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(run.mesh))
        actors = load_actors(run)
        prompts = load_prompts(run, actors.sft, ppo.max_prompt_length, name)
        check_positions(actors, int(prompts.lengths.max()))
        say_of_warmup(run, name, ppo.optimizer, policy_updates(ppo))
        policy_optimizer, critic_optimizer = make_optimizers(ppo)
        checkpoints = Checkpoints(checkpoint_folder(run, name), keep=ppo.max_to_keep)
        stack.callback(checkpoints.close)
        ahead = abstract_rollouts(run, actors, prompts) if ppo.overlap_rollouts else None
        start, whole, extra = fresh_or_restored(
            checkpoints,
            functools.partial(start_state, run, actors, policy_optimizer, critic_optimizer),
            functools.partial(whole_state, ahead=ahead),
        )
        actors = frozen(actors, ppo, run.config.compute_dtype)
        tables = {file: records_until(run.path(name, file), start) for file in TABLES}
        if extra is None:
            state, extra = whole, {}
            save_policy(run, actors, state, 0, name)
            ahead = collect(run, state, actors, prompts, 1) if ppo.overlap_rollouts else None
        else:
            state, ahead = parts_of(whole, ppo)
            say_of_gaps(run, name, start, tables)
        metrics = run.metrics(name, start, extra.get(LOGGED))
        stack.callback(metrics.close)
        settings, placement = run.config.mesh, shardings_of(state)
        learners = training_players(actors.players, settings, run.mesh)
        spread = training_spread(
            settings, run.mesh, {"policy": placement.policy.params, "critic": placement.critic.params}
        )
        warming, training = (
            make_update(learners, ppo, policy_optimizer, critic_optimizer, trains, placement, spread)
            for trains in (False, True)
        )
        guard = Guard(run, name, checkpoints, ppo.guards.max_skips, extra)
        sampler = stack.enter_context(ThreadPoolExecutor(1)) if overlaps(run) else None
        progress = stack.enter_context(run.progress(name, ppo.steps, start))
        stack.enter_context(saves_first())
        for step in range(start + 1, ppo.steps + 1):
            update = training if step > ppo.critic_warmup_steps else warming
            gathered = ahead or collect(run, state, actors, prompts, step)
            if ahead is None and step > 1:
                # The updates may take longer than a preempted machine has left; what was sampled is sampled again.
                stop_if_asked(
                    asked_to_stop(), run, name, step - 1, state, checkpoints, lambda: kept_beside(guard, metrics)
                )
            # Sampled by the policy that the updates below leave behind; the last step keeps what it has.
            begun = None
            if ppo.overlap_rollouts and step < ppo.steps:
                begun = begin_rollouts(run, state, actors, prompts, step + 1, sampler)
            state, figures, arrays = learn(run, state, actors, gathered, step, update, guard)
            if ppo.overlap_rollouts:
                ahead = gathered if begun is None else begun()
            # A policy that isn't trained yet has a KL of 0, which says nothing of the coefficient.
            if step > ppo.critic_warmup_steps and math.isfinite(figures.get("kl", math.nan)):
                state = dataclasses.replace(state, kl_coef=next_kl_coef(state.kl_coef, figures["kl"], ppo))
            last = step == ppo.steps
            if step % ppo.log_every == 0 or last:
                metrics.log(step, figures)
            if step % ppo.sample_every == 0 or step == 1 or last:
                # Every host needs whole arrays; they are split over the devices of all.
                shown = jax.device_get(jax.device_put((gathered.samples, arrays), replicated(run.mesh)))
                queries = [prompts.texts[row] for row in prompt_rows(run, prompts, step)]
                for file, make in TABLES.items():
                    tables[file] += make(actors.sft.tokenizer, queries, *shown, step)
                    write_records(run.path(name, file), tables[file])
            if step % ppo.sample_every == 0 or last:
                save_policy(run, actors, state, step, name)
            whole = whole_state(state, ahead)
            if step % ppo.checkpoint_every == 0 or last:
                checkpoints.save(step, whole, kept_beside(guard, metrics))
            progress.advance(1, **{key: figures[key] for key in ("reward", "kl") if key in figures})
            stop_if_asked(asked_to_stop(), run, name, step, whole, checkpoints, lambda: kept_beside(guard, metrics))
        checkpoints.wait()
        guard.say_what_was_skipped(ppo.steps)
        save_model(run.path(name, "model"), policy_model(run, actors, state, name))
        metrics.close()
    lines = read_records(run.path(name, "metrics.jsonl"))
    # They may have been lost behind a finished training.
    final = lines[-1] if lines and lines[-1]["step"] == ppo.steps else {}
    kept = ("reward", "kl", "missing_eos", "response_length", "kl_coef")
    return {
        "steps": ppo.steps, "queries": len(prompts.texts), **{key: final[key] for key in kept if key in final}
    }  # fmt: skip


def run_over_optimised(run: Run) -> dict[str, Any]:
    """The same with the KL penalty of the section `over_optimisation`: -> over_optimisation/; nothing without it."""
    settings = run.config.over_optimisation
    if settings is None:
        return {"over_optimisation": "off"}
    ppo = run.config.ppo
    # To go astray is what this run is for: what the penalty would have held back is measured, and stops nothing.
    guards = ppo.guards.model_copy(update={"kl": "off", "entropy": "off"})
    changed = {**settings.model_dump(), "kl_controller": "fixed", "keep_reference": True, "guards": guards}
    config = run.config.model_copy(update={"ppo": ppo.model_copy(update=changed)})
    return run_stage(dataclasses.replace(run, config=config), "over_optimisation")


def draw(run: Run, state: PpoState, actors: Actors, prompts: Prompts, rows: np.ndarray, step: int) -> Samples:
    """Responses of the policy as it is to the prompts at `rows` [B], as global arrays; the step decides their keys."""
    requests = [
        Request(f"{step}/{place}", tuple(prompts.tokens[row, : prompts.lengths[row]].tolist()))
        for place, row in enumerate(rows)
    ]
    # With a mesh for sampling the policy goes there for as long as this takes.
    params, policy = run.to_sample(state.policy.params, actors.players.policy)
    completions = generate(
        params,
        policy,
        requests,
        actors.rules,
        engine_settings(run.config.ppo.sampling),
        seed=run.seed("rlsf/samples"),
        prefix_tokens=(),
        stops=actors.stops,
    )
    samples = stacked(
        list(completions), actors.rules.max_new_tokens, actors.stops, actors.sft.tokenizer.decode_exactly
    )
    return Samples(**place_batch(dataclasses.asdict(samples), run.mesh))


def collect(run: Run, state: PpoState, actors: Actors, prompts: Prompts, step: int) -> Gathered:
    """The rollouts of a step and what the models say of them.

    Args:
        run: for its config, mesh and seeds.
        state: whose policy samples.
        actors: the frozen models.
        prompts: all of them.
        step: counted from 1; with the run's seed it decides which prompts, and what is sampled.
    """
    ppo, rows = run.config.ppo, prompt_rows(run, prompts, step)
    batch = place_batch({"tokens": prompts.tokens[rows], "lengths": prompts.lengths[rows]}, run.mesh)
    samples = draw(run, state, actors, prompts, rows, step)
    judged = judge(
        state.policy.params,
        actors.sft.params or None,
        state.critic.params,
        actors.reward.params,
        batch["tokens"],
        batch["lengths"],
        samples,
        actors.players,
        ppo.judge_micro_batches or ppo.num_mini_batches * ppo.micro_batches,
    )
    found = Gathered(samples, judged)
    # What may come from a checkpoint must lie as that would.
    return jax.device_put(found, batch_sharding(run.mesh)) if ppo.overlap_rollouts else found


def overlaps(run: Run) -> bool:
    """Whether rollouts ahead are made while the updates run, by a thread of their own.

    On one device alone: of two programs that two threads start at once on several, each device may run another one
    first, and their collectives then wait for each other for ever.
    """
    return run.config.ppo.overlap_rollouts and run.mesh.size == 1


def begin_rollouts(
    run: Run, state: PpoState, actors: Actors, prompts: Prompts, step: int, sampler: Executor | None
) -> Callable[[], Gathered]:
    """Begin to `collect` the rollouts of a step; the call of what is returned waits for them and gives them.

    They come from copies of the parameters, so that the state may be donated at once. Without a `sampler` they are
    there on return.
    """
    if sampler is None:
        found = collect(run, state, actors, prompts, step)
        return lambda: found
    policy, critic = (
        dataclasses.replace(trained, params=jax.tree.map(jnp.copy, trained.params), opt_state=())
        for trained in (state.policy, state.critic)
    )
    own = PpoState(policy, critic, jnp.copy(state.kl_coef))

    def work() -> Gathered:
        # A mesh is set for one thread.
        with jax.set_mesh(run.mesh):
            return collect(run, own, actors, prompts, step)

    return sampler.submit(work).result


def learn(
    run: Run, state: PpoState, actors: Actors, gathered: Gathered, step: int, update: Update, guard: Guard
) -> tuple[PpoState, dict[str, float], dict[str, Any]]:
    """All updates on one step's rollouts, unless a guard leaves them out.

    Args:
        run: for its config and seeds.
        state: is donated.
        actors: the frozen models.
        gathered: from `collect`.
        step: counted from 1.
        update: from `make_update`.
        guard: acts on what is wrong with the rollouts or an update.

    Returns:
        The next state; figures: those of `experience`, the mean over updates of theirs, the KL coefficient of this
        step, and `sampler_gap`, the largest difference between the sampler's log-probs and the trainer's; and the
        arrays of `rollout_tables`.

    Raises:
        TrainingDiverged: the guard stopped training.
    """
    ppo, samples, rollouts = run.config.ppo, gathered.samples, gathered.rollouts
    learned, on_device = experience(rollouts, state.kl_coef, actors.players, ppo)
    arrays = {name: on_device.pop(name) for name in list(on_device) if name.startswith(("row_", "token_"))}
    arrays |= {"logprobs": rollouts.logprobs, "values": rollouts.values, "advantages": learned.advantages}
    mask = length_mask(samples.lengths, samples.tokens.shape[1])
    on_device["sampler_gap"] = jnp.max(jnp.abs(samples.logprobs - rollouts.logprobs), initial=0.0, where=mask)
    on_device["at_limit"] = 1.0 - samples.stopped.astype(jnp.float32).mean()
    on_device["kl_coef"] = jnp.copy(state.kl_coef)
    figures = fetched({**on_device, "updates": state.policy.step})
    figures["learning_rate"] = policy_learning_rate(ppo, step, int(figures.pop("updates")))
    if ppo.overlap_rollouts:
        figures["steps_off_policy"] = float(step > 1)
    problems = rollout_problems(figures, ppo)
    drawn_by = step - (2 if ppo.overlap_rollouts else 1)
    skipped = guard.skips(step, problems, drawn_by) if acts(problems) else False
    if not skipped:
        state, every = updated(run, state, learned, step, update)
        figures |= mean_figures(every, ppo)
        skipped = guard.skips(step, update_problems(every, ppo))
    if "skip" in ppo.guards.model_dump().values():
        figures["skipped"] = float(skipped)
    return state, figures, arrays


def updated(
    run: Run, state: PpoState, learned: Experience, step: int, update: Update
) -> tuple[PpoState, list[dict[str, float]]]:
    """Every epoch and mini-batch of a step, until the policy is too far from where it sampled; figures per update."""
    ppo, every = run.config.ppo, []
    for epoch in range(ppo.num_ppo_epochs):
        order = epoch_order(
            run.seed("rlsf/mini_batches"), (step - 1) * ppo.num_ppo_epochs + epoch, learned.tokens.shape[0]
        )
        for part in np.split(order.astype(np.int32), ppo.num_mini_batches):
            state, own = update(state, learned, part)
            every.append(own)
            if ppo.early_stop_kl and float(own["too_far"]):
                return state, [fetched(own) for own in every]
    return state, [fetched(own) for own in every]


def prompt_rows(run: Run, prompts: Prompts, step: int) -> np.ndarray:
    """The [B] indices of a step's prompts."""
    return batch_indices(step - 1, run.config.ppo.batch_size, len(prompts.texts), run.seed("rlsf/prompts"))


def whole_state(state: PpoState, ahead: Gathered | None) -> Any:
    """What a checkpoint holds: the state, and rollouts that were sampled ahead."""
    return state if ahead is None else {"state": state, "ahead": ahead}


def parts_of(whole: Any, ppo: PpoConfig) -> tuple[PpoState, Gathered | None]:
    """The inverse of `whole_state`."""
    return (whole["state"], whole["ahead"]) if ppo.overlap_rollouts else (whole, None)


def abstract_rollouts(run: Run, actors: Actors, prompts: Prompts) -> Gathered:
    """Shapes, dtypes and shardings of what `collect` returns, to restore it into."""
    where = batch_sharding(run.mesh)
    rows, answer = run.config.ppo.batch_size, actors.rules.max_new_tokens
    width = prompts.tokens.shape[1] + answer

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    words, number, figures = array(jnp.int32, answer), array(jnp.int32), array(jnp.float32, answer)
    return Gathered(
        Samples(tokens=words, logprobs=figures, lengths=number, content=number, stopped=array(jnp.bool_)),
        Rollouts(
            tokens=array(jnp.int32, width), prompt_lengths=number, responses=words, lengths=number, logprobs=figures,
            entropies=figures, reference_logprobs=figures if run.config.ppo.uses_reference else None, values=figures,
            scores=array(jnp.float32),
        ),
    )  # fmt: skip


def start_state(
    run: Run,
    actors: Actors,
    policy_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
) -> PpoState:
    """The state before the first step: the SFT policy, and a critic.

    The critic is the reward model with its own head, or the SFT model with a zero head, which predicts 0 (Huang et al.
    2023, detail on value heads).
    """
    if run.config.ppo.critic == "reward_model":
        critic = actors.reward.params
    else:
        critic = add_head(actors.sft.params, actors.sft.config, jax.random.key(0), stddev=0.0)
        critic = {**critic, "score": jax.device_put(critic["score"], replicated(run.mesh))}
    settings, mesh = run.config.mesh, run.mesh
    policy = placed_for_training(actors.sft.params, actors.players.policy, settings, mesh)
    critic = placed_for_training(critic, actors.players.critic, settings, mesh)
    return PpoState(
        fresh_state(policy, policy_optimizer, mesh),
        fresh_state(critic, critic_optimizer, mesh),
        jax.device_put(jnp.float32(run.config.ppo.kl_coef), replicated(run.mesh)),
    )


def policy_model(run: Run, actors: Actors, state: PpoState, name: str) -> Model:
    """The policy as a model to save."""
    return dataclasses.replace(actors.sft, params=state.policy.params, name=f"{run.config.name}/{name}")


def say_of_gaps(run: Run, name: str, start: int, tables: Mapping[str, list[Record]]) -> None:
    """Name the kept policies, and the steps in the tables, that a run at step `start` should have and has not."""
    ppo = run.config.ppo
    kept = [step for step in range(start + 1) if step % ppo.sample_every == 0 or step == ppo.steps]
    lost = {"policies": [step for step in kept if not is_complete(run.path(name, "policies", str(step)))]}
    shown = sorted({1, *kept[1:]})
    for file, records in tables.items():
        seen = {record["step"] for record in records}
        lost[file] = [step for step in shown if step not in seen]
    for where, steps in lost.items():
        if steps:
            run.say(f"{name}: {where} lacks {', '.join(map(str, steps))} of the steps so far; nothing makes them again")


def save_policy(run: Run, actors: Actors, state: PpoState, step: int, name: str) -> None:
    """Save a snapshot of the policy after `step` steps, for the curve of quality against KL."""
    save_model(run.path(name, "policies", str(step)), policy_model(run, actors, state, name))
