"""Reinforcement learning from synthetic feedback: PPO from the SFT policy against the reward model.

A step: sample responses to a batch of the demonstrations' queries, score them, spread score and KL penalty over
tokens, estimate advantages, update policy and critic on mini-batches. Source: ALMoST (arXiv 2305.13735), section 2.4;
Schulman et al. 2017; Ziegler et al. 2019; details after Huang et al., "The N Implementation Details of RLHF with PPO",
2023.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from almost_jax.config import MeshConfig
from almost_jax.core.heads import add_head
from almost_jax.core.losses import length_mask
from almost_jax.core.partitioning import platform, replicated
from almost_jax.errors import InputError
from almost_jax.io.batches import batch_indices, epoch_order, pad
from almost_jax.io.checkpoints import Checkpoints
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.preemption import saves_first
from almost_jax.io.records import Record, read_records, write_records
from almost_jax.io.run import Run
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.sampler import Samples, decode_layout, sample
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.execution import placed_for_training, training_shape, training_spread
from almost_jax.stages.prompting import sampling_rules
from almost_jax.stages.reward import load_reward_model
from almost_jax.stages.rollouts import Players, experience, judge
from almost_jax.stages.templates import LABELS
from almost_jax.stages.training import (
    CHECKPOINTS_KEPT,
    abstract,
    checkpoint_folder,
    fixed_length,
    fresh_state,
    host_figures,
    place_batch,
    shardings_of,
    stop_if_asked,
)
from almost_jax.stages.updates import (
    PpoState,
    Update,
    make_optimizers,
    make_update,
    next_kl_coef,
    policy_learning_rate,
)

NAME = "rlsf"
# Rollouts of a batch that are written to samples.jsonl.
SAMPLES_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Actors:
    """The frozen models and static facts of a run."""

    sft: Model
    reward: Model
    players: Players
    rules: SamplingRules


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Queries as token rows: ids and texts, tokens [n, P] int32, lengths [n] int32."""

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray


def run_stage(run: Run) -> dict[str, Any]:
    """Train by PPO: sft/model, reward/model, demonstrations.jsonl -> rlsf/model, rlsf/policies/STEP, samples.jsonl.

    Stopped and resumed, it leaves the same bytes as if it had never stopped: all randomness is a function of seed and
    step, and the checkpoint holds the rest, the KL coefficient included.

    Raises:
        InputError: the models don't fit together, or a config value can't work.
        TrainingDiverged: a loss, a KL or a reward is not finite.
        Preempted: SIGTERM came; the state is saved.
    """
    ppo = run.config.ppo
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(run.mesh))
        actors = load_actors(run)
        prompts = load_prompts(run, actors.sft, ppo.max_prompt_length)
        check_positions(actors, prompts.tokens.shape[1])
        policy_optimizer, critic_optimizer = make_optimizers(ppo)
        state = start_state(run, actors, policy_optimizer, critic_optimizer)
        checkpoints = Checkpoints(checkpoint_folder(run, NAME), keep=CHECKPOINTS_KEPT)
        stack.callback(checkpoints.close)
        found = checkpoints.restore(abstract(state))
        start = 0
        if found is not None:
            start, state, _ = found
        else:
            save_policy(run, actors, state, 0)
        shown = _records_until(run, start)
        metrics = run.metrics(NAME, start)
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
        progress = stack.enter_context(run.progress(NAME, ppo.steps, start))
        stack.enter_context(saves_first())
        for step in range(start + 1, ppo.steps + 1):
            update = training if step > ppo.critic_warmup_steps else warming
            rows = batch_indices(step - 1, ppo.batch_size, len(prompts.texts), run.seed("rlsf/prompts"))
            state, samples, on_device = ppo_step(run, state, actors, prompts, rows, step, update)
            row_kl, row_score = (on_device.pop(name) for name in ("row_kl", "row_score"))
            figures = host_figures(NAME, step, on_device, checkpoints)
            figures["learning_rate"] = policy_learning_rate(ppo, step)
            state = dataclasses.replace(state, kl_coef=next_kl_coef(state.kl_coef, figures["kl"], ppo))
            last = step == ppo.steps
            if step % ppo.log_every == 0 or last:
                metrics.log(step, figures)
            if step % ppo.sample_every == 0 or step == 1 or last:
                # Every host needs whole arrays; they are split over the devices of all.
                fetched = jax.device_get(jax.device_put((samples, row_score, row_kl), replicated(run.mesh)))
                shown += sample_records(actors, prompts, rows, fetched[0], fetched[1], fetched[2], step)
                write_records(run.path(NAME, "samples.jsonl"), shown)
            if step % ppo.sample_every == 0 or last:
                save_policy(run, actors, state, step)
            if step % ppo.checkpoint_every == 0 or last:
                checkpoints.save(step, state, {})
            progress.advance(1, reward=figures["reward"], kl=figures["kl"])
            stop_if_asked(run, NAME, step, state, checkpoints)
        save_model(run.path(NAME, "model"), policy_model(run, actors, state))
        metrics.close()
    final = read_records(run.path(NAME, "metrics.jsonl"))[-1]
    kept = ("reward", "kl", "missing_eos", "response_length", "kl_coef")
    return {"steps": ppo.steps, "queries": len(prompts.texts), **{name: final[name] for name in kept}}


def ppo_step(
    run: Run, state: PpoState, actors: Actors, prompts: Prompts, rows: np.ndarray, step: int, update: Update
) -> tuple[PpoState, Samples, dict[str, Any]]:
    """One step: rollouts of the prompts at `rows`, and all updates on them.

    Args:
        run: for its config, mesh and seeds.
        state: is donated.
        actors: the frozen models.
        prompts: all of them.
        rows: [B] indices of this step's prompts.
        step: counted from 1; with the run's seed it decides what is sampled.
        update: from `make_update`.

    Returns:
        The next state, the samples, and figures: those of `experience`, the mean over updates of theirs, the KL
        coefficient of this step, and `sampler_gap`, the largest difference between the sampler's log-probs and the
        trainer's.
    """
    ppo = run.config.ppo
    batch = place_batch({"tokens": prompts.tokens[rows], "lengths": prompts.lengths[rows]}, run.mesh)
    key = jax.random.fold_in(jax.random.key(run.seed("rlsf/samples")), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(rows)))
    params, config = decode_layout(state.policy.params, actors.players.policy, platform())
    samples = sample(params, config, batch["tokens"], batch["lengths"], keys, None, actors.rules)
    rollouts = judge(
        state.policy.params,
        actors.sft.params,
        state.critic.params,
        actors.reward.params,
        batch["tokens"],
        batch["lengths"],
        samples,
        actors.players,
        ppo.num_mini_batches * ppo.micro_batches,
    )
    learned, figures = experience(rollouts, state.kl_coef, actors.players, ppo)
    mask = length_mask(samples.lengths, samples.tokens.shape[1])
    figures["sampler_gap"] = jnp.max(jnp.abs(samples.logprobs - rollouts.logprobs), initial=0.0, where=mask)
    figures["kl_coef"] = jnp.copy(state.kl_coef)
    every = []
    for epoch in range(ppo.num_ppo_epochs):
        order = epoch_order(run.seed("rlsf/mini_batches"), (step - 1) * ppo.num_ppo_epochs + epoch, len(rows))
        for part in np.split(order.astype(np.int32), ppo.num_mini_batches):
            state, own = update(state, learned, part)
            every.append(own)
    fetched = jax.device_get(every)
    return state, samples, {**figures, **{name: np.mean([own[name] for own in fetched]) for name in fetched[0]}}


def load_actors(run: Run) -> Actors:
    """Load SFT policy and reward model, and fix everything static.

    Raises:
        InputError: they have different tokenizers, or one of them is missing.
    """
    ppo = run.config.ppo
    sft = load_model(str(run.path("sft", "model")), run.mesh, run.config.compute_dtype)
    reward = load_reward_model(run, "reward")
    if sft.tokenizer.fingerprint != reward.tokenizer.fingerprint:
        raise InputError("reward.model and sft.model must share a tokenizer: the one reads the other's tokens")
    tokenizer = sft.tokenizer
    # A policy that goes on with the human's part has stopped too, though it doesn't count as an end.
    human = tokenizer.single_token(LABELS["human"])
    stops = tuple(sorted({tokenizer.eos_id} | ({human} if human is not None else set())))
    rules = sampling_rules(ppo.sampling, stops)
    normalizes = ppo.critic == "reward_model" and ppo.normalize_reward
    players = Players(
        policy=sft.config,
        critic=reward.config if ppo.critic == "reward_model" else sft.config,
        reward=reward.config,
        temperature=rules.logprob_temperature,
        stop_tokens=stops,
        eos_id=tokenizer.eos_id,
        reward_mean=reward.reward_mean,
        reward_std=reward.reward_std,
        value_shift=reward.reward_mean if normalizes else 0.0,
        value_scale=reward.reward_std if normalizes else 1.0,
    )
    return Actors(sft, reward, players, rules)


def training_players(players: Players, settings: MeshConfig, mesh: jax.sharding.Mesh) -> Players:
    """The players as an update runs them, see `execution.training_shape`."""
    return dataclasses.replace(
        players,
        policy=training_shape(players.policy, settings, mesh),
        critic=training_shape(players.critic, settings, mesh),
    )


def load_prompts(run: Run, model: Model, max_length: int) -> Prompts:
    """The demonstrations' queries as prompts of one padded length; longer ones are dropped and counted.

    Raises:
        InputError: none fits.
    """
    records = read_records(run.path("demonstrations.jsonl"))
    texts = list(dict.fromkeys(record["turns"][0]["text"] for record in records))
    rows = [prompt_tokens(model.tokenizer, [{"role": "human", "text": text}]) for text in texts]
    fitting = [(text, row) for text, row in zip(texts, rows, strict=True) if len(row) <= max_length]
    if not fitting:
        raise InputError(f"ppo.max_prompt_length: none of {len(texts)} queries fits into {max_length} tokens")
    run.say(f"{NAME}: {len(fitting)} queries, {len(texts) - len(fitting)} too long")
    width = fixed_length(max(len(row) for _, row in fitting))
    tokens, lengths = pad([row for _, row in fitting], width, model.tokenizer.pad_id)
    return Prompts([text for text, _ in fitting], tokens, lengths)


def check_positions(actors: Actors, width: int) -> None:
    """Refuse prompts and responses that don't fit into a model's positions together.

    Raises:
        InputError: they don't.
    """
    needed = width + actors.rules.max_new_tokens + 1
    for name, config in (("sft", actors.players.policy), ("reward", actors.players.reward)):
        if needed > config.max_position_embeddings:
            raise InputError(
                f"ppo: prompts of {width} tokens + max_new_tokens {actors.rules.max_new_tokens} + 1 exceed the "
                f"{config.max_position_embeddings} positions of the {name} model; lower one of the two"
            )


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


def sample_records(
    actors: Actors,
    prompts: Prompts,
    rows: np.ndarray,
    samples: Any,
    scores: np.ndarray,
    kls: np.ndarray,
    step: int,
) -> list[Record]:
    """The first rollouts of a step, to be read by people.

    Args:
        actors: for the tokenizer.
        prompts: all of them.
        rows: [B] indices of the step's prompts.
        samples: `Samples` on the host.
        scores, kls: [B], not normalised, and summed over each response.
        step: counted from 1.
    """
    shown = range(min(SAMPLES_SHOWN, len(rows)))
    tokens, lengths, stopped = samples.tokens, samples.lengths, samples.stopped
    records: list[Record] = []
    for row in shown:
        content = tokens[row, : lengths[row] - int(stopped[row])].tolist()
        ends = stopped[row] and tokens[row, lengths[row] - 1] == actors.players.eos_id
        records.append(
            {
                "step": step,
                "query": prompts.texts[rows[row]],
                "response": actors.sft.tokenizer.decode(content),
                "finish": "eos" if ends else "stop" if stopped[row] else "length",
                "score": float(scores[row]),
                "kl": float(kls[row]),
            }
        )
    return records


def policy_model(run: Run, actors: Actors, state: PpoState) -> Model:
    """The policy as a model to save."""
    return dataclasses.replace(actors.sft, params=state.policy.params, name=f"{run.config.name}/{NAME}")


def save_policy(run: Run, actors: Actors, state: PpoState, step: int) -> None:
    """Save a snapshot of the policy after `step` steps, for the curve of quality against KL."""
    save_model(run.path(NAME, "policies", str(step)), policy_model(run, actors, state))


def _records_until(run: Run, step: int) -> list[Record]:
    """The samples already written, up to the step that training goes on from."""
    path = run.path(NAME, "samples.jsonl")
    return [record for record in read_records(path) if record["step"] <= step] if path.exists() else []
