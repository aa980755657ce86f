"""Who takes part in PPO beside what is trained: the SFT policy as reference, the reward model, the prompts."""

import dataclasses

import jax
import numpy as np

from almost_jax.config import MeshConfig, PpoConfig
from almost_jax.core.llama import LlamaConfig, cast_matrices
from almost_jax.errors import InputError
from almost_jax.io.batches import pad
from almost_jax.io.models import Model, load_model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.stops import StopStrings
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.execution import judging_shape, training_shape
from almost_jax.stages.prompting import sampling_rules, spanning_stops, stop_tokens
from almost_jax.stages.reward import load_reward_model
from almost_jax.stages.rollouts import Players
from almost_jax.stages.templates import LABELS
from almost_jax.stages.training import fixed_length


@dataclasses.dataclass(frozen=True)
class Actors:
    """The frozen models and static facts of a run; the SFT model's parameters are the reference's, none without one."""

    sft: Model
    reward: Model
    players: Players
    rules: SamplingRules
    stops: StopStrings | None


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Queries as token rows: ids and texts, tokens [n, P] int32, lengths [n] int32."""

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray


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
    human = (f"\n{LABELS['human']}",)
    rules = sampling_rules(ppo.sampling, stop_tokens(tokenizer, human))
    normalizes = ppo.critic == "reward_model" and ppo.normalize_reward
    players = Players(
        policy=judging_shape(sft.config, run.config.mesh, run.mesh),
        critic=judging_shape(
            reward.config if ppo.critic == "reward_model" else sft.config, run.config.mesh, run.mesh
        ),
        reward=judging_shape(reward.config, run.config.mesh, run.mesh),
        temperature=rules.logprob_temperature,
        eos_id=tokenizer.eos_id,
        reward_mean=reward.reward_mean,
        reward_std=reward.reward_std,
        value_shift=reward.reward_mean if normalizes else 0.0,
        value_scale=reward.reward_std if normalizes else 1.0,
    )
    return Actors(sft, reward, players, rules, spanning_stops(tokenizer, human))


def training_players(players: Players, settings: MeshConfig, mesh: jax.sharding.Mesh) -> Players:
    """The players as an update runs them, see `execution.training_shape`, but with the attention that judges rollouts.

    Another kernel rounds otherwise, and the first ratio would not be exactly 1.
    """

    def shape(config: LlamaConfig) -> LlamaConfig:
        judged = judging_shape(config, settings, mesh)
        return dataclasses.replace(training_shape(config, settings, mesh), attention=judged.attention)

    return dataclasses.replace(players, policy=shape(players.policy), critic=shape(players.critic))


def load_prompts(run: Run, model: Model, max_length: int, name: str) -> Prompts:
    """The demonstrations' queries as prompts of one padded length; longer ones are dropped, and counted as `name` says.

    Raises:
        InputError: none fits.
    """
    records = read_records(run.path("demonstrations.jsonl"))
    texts = list(dict.fromkeys(record["turns"][0]["text"] for record in records))
    rows = [prompt_tokens(model.tokenizer, [{"role": "human", "text": text}]) for text in texts]
    fitting = [(text, row) for text, row in zip(texts, rows, strict=True) if len(row) <= max_length]
    if not fitting:
        raise InputError(f"ppo.max_prompt_length: none of {len(texts)} queries fits into {max_length} tokens")
    run.say(f"{name}: {len(fitting)} queries, {len(texts) - len(fitting)} too long")
    width = fixed_length(max(len(row) for _, row in fitting))
    tokens, lengths = pad([row for _, row in fitting], width, model.tokenizer.pad_id)
    return Prompts([text for text, _ in fitting], tokens, lengths)


def check_positions(actors: Actors, longest: int) -> None:
    """Refuse prompts, of which the longest has so many tokens, that don't fit with a response into a model's positions.

    Raises:
        InputError: they don't.
    """
    needed = longest + actors.rules.max_new_tokens + 1
    for name, config in (("sft", actors.players.policy), ("reward", actors.players.reward)):
        if needed > config.max_position_embeddings:
            raise InputError(
                f"ppo: prompts of up to {longest} tokens + max_new_tokens {actors.rules.max_new_tokens} + 1 exceed the "
                f"{config.max_position_embeddings} positions of the {name} model; lower one of the two"
            )


def frozen(actors: Actors, ppo: PpoConfig, compute_dtype: str) -> Actors:
    """The actors as they stay beside the state: matrices in `ppo.frozen_dtype`, no reference where nothing uses it."""
    dtype = compute_dtype if ppo.frozen_dtype == "compute" else ppo.frozen_dtype
    reference = cast_matrices(actors.sft.params, dtype) if ppo.uses_reference else {}
    reward = cast_matrices(actors.reward.params, dtype)
    return dataclasses.replace(
        actors,
        sft=dataclasses.replace(actors.sft, params=reference),
        reward=dataclasses.replace(actors.reward, params=reward),
    )
