"""Every program that an experiment runs, as something to compile: its shapes, its shardings, no arrays.

Lengths that only data can tell are taken at the limits of the config: training rows at `max_length`, prompts at
`ppo.max_prompt_length`. Few-shot prefixes are left out of the sampling programs; their keys and values are one copy for
a batch, and small beside it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from almost_jax.config import DpoConfig, ExperimentConfig, TrainingConfig
from almost_jax.core.heads import head_axes
from almost_jax.core.llama import (
    LlamaConfig,
    abstract_params,
    empty_cache,
    hidden_states_cached,
    logical_axes,
    logits,
)
from almost_jax.core.partitioning import batch_sharding, partition_spec, replicated, row_parts, rules_for, shardings
from almost_jax.core.train import TrainState, make_optimizer, make_train_step
from almost_jax.plan.shapes import model_shape
from almost_jax.sampling.rows import Samples
from almost_jax.sampling.rules import SamplingRules, draw
from almost_jax.sampling.scoring import _sequence_scores
from almost_jax.stages.actors import training_players
from almost_jax.stages.dpo import _response_logprobs, dpo_loss_sums
from almost_jax.stages.execution import judging_shape, training_shape, training_shardings, training_spread
from almost_jax.stages.pair_rows import pair_loss_sums
from almost_jax.stages.rollouts import Experience, Players, judge
from almost_jax.stages.sft import sft_loss_sums
from almost_jax.stages.updates import PpoState, make_optimizers, make_update


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to compile: a jitted function and the abstract arguments to lower it with.

    `parameters`, `optimizer` and `cache` are bytes of its arguments on a device; `beside` are those of what lies there
    too while it runs; `knobs` are config keys that change its memory; `heads` are the model's, `kv_heads` those of its
    cache.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    parameters: int
    optimizer: int
    cache: int
    knobs: tuple[str, ...]
    heads: int = 0
    kv_heads: int = 0
    beside: int = 0


def program_names(config: ExperimentConfig) -> list[str]:
    """The programs of an experiment, by the names that `build` knows."""
    names = ["sft_step", "reward_step", "ppo_update", "ppo_judge", "score_reward"]
    if config.dpo is not None:
        names += ["dpo_reference", "dpo_step"]
    for name in _sampled(config):
        names += [f"prefill_{name}", f"decode_{name}"]
    return names


def samples(name: str) -> bool:
    """Whether a program samples or scores, and so runs on the mesh for sampling where the experiment has one."""
    return name.startswith(("prefill_", "decode_", "score_"))


def build(config: ExperimentConfig, mesh: Mesh, name: str) -> Program:
    """One program by its name; trace it inside `jax.set_mesh` and `lowering_for`."""
    if name == "sft_step":
        return _sft_step(config, mesh)
    if name == "reward_step":
        return _reward_step(config, mesh)
    if name == "ppo_update":
        return _ppo_update(config, mesh)
    if name == "ppo_judge":
        return _ppo_judge(config, mesh)
    if name == "score_reward":
        return _score_reward(config, mesh)
    if name == "dpo_reference":
        return _dpo_reference(config, mesh)
    if name == "dpo_step":
        return _dpo_step(config, mesh)
    kind, _, model = name.partition("_")
    return _sampling(config, mesh, kind, model)


def _sampled(config: ExperimentConfig) -> list[str]:
    found = [prompted.model for prompted in config.comparisons.configurations.values()]
    found += [config.demonstrations.assistant.model, config.demonstrations.user.model, config.sft.model]
    return sorted(set(found), key=list(config.models).index)


def _shape(config: ExperimentConfig, model: str) -> LlamaConfig:
    found = model_shape(f"models.{model}", config.models[model])
    return dataclasses.replace(found, dtype=config.compute_dtype)


def _placed(tree: Any, placement: Any, dtype: Any = None) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where), tree, placement
    )


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def device_bytes(tree: Any) -> int:
    """Bytes of an abstract, placed tree on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = 1
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size * jnp.dtype(leaf.dtype).itemsize
    return total


def _with_head(tree: Any, shape: LlamaConfig) -> Any:
    return {**tree, "score": {"kernel": jax.ShapeDtypeStruct((shape.hidden_size,), jnp.float32)}}


def _loaded(mesh: Mesh, shape: LlamaConfig, head: bool, dtype: Any) -> Any:
    """A model's parameters as a stage that doesn't train it has them."""
    tree = _with_head(abstract_params(shape), shape) if head else abstract_params(shape)
    axes = {**logical_axes(shape), **head_axes()} if head else logical_axes(shape)
    return _placed(tree, shardings(axes, mesh), jnp.dtype(dtype))


def _state(config: ExperimentConfig, mesh: Mesh, shape: LlamaConfig, optimizer: Any, head: bool) -> TrainState:
    placement = training_shardings(shape, config.mesh, mesh, head)
    tree = _with_head(abstract_params(shape), shape) if head else abstract_params(shape)
    params = _placed(tree, placement, jnp.float32)
    whole = replicated(mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(optimizer.init, params),
        placement,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, params, moments)


def _supervised(
    config: ExperimentConfig, mesh: Mesh, name: str, model: str, training: TrainingConfig, head: bool,
    loss: Callable[..., Any], batch: dict[str, jax.ShapeDtypeStruct], runs_as: LlamaConfig | None = None,
) -> Program:  # fmt: skip
    shape = _shape(config, model)
    optimizer = make_optimizer(training.optimizer, 1000)
    state = _state(config, mesh, shape, optimizer, head)
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(
        functools.partial(loss, config=runs_as or training_shape(shape, config.mesh, mesh)),
        optimizer,
        training.micro_batches,
        placement,
        training_spread(config.mesh, mesh, placement.params),
    )
    section = name.removesuffix("_step")
    knobs = tuple(f"{section}.training.{key}" for key in ("micro_batches", "batch_size", "max_length"))
    if "segment_ids" in batch:
        knobs += (f"{section}.packed_length",)
    return Program(
        name, step, (state, batch), device_bytes(state.params), device_bytes(state.opt_state), 0,
        (*knobs, "mesh.remat", "mesh.explicit", "mesh.fsdp"),
    )  # fmt: skip


def _sft_step(config: ExperimentConfig, mesh: Mesh) -> Program:
    settings, training = config.sft, config.sft.training
    shape, whole = (training.batch_size, training.max_length), ["tokens"]
    if settings.packed_length:
        fitting = settings.packed_length // training.max_length
        split = training.micro_batches * row_parts(mesh)
        shape = (-(-training.batch_size // (fitting * split)) * split, settings.packed_length)
        whole += ["positions", "segment_ids"]
    batch = {name: _rows(mesh, shape, jnp.int32) for name in whole} | {"targets": _rows(mesh, shape, jnp.bool_)}
    loss = functools.partial(sft_loss_sums, z_loss=settings.z_loss)
    return _supervised(config, mesh, "sft_step", settings.model, training, False, loss, batch)


def _reward_step(config: ExperimentConfig, mesh: Mesh) -> Program:
    settings, training = config.reward, config.reward.training
    if settings.packed_length:
        runs_as = training_shape(_shape(config, settings.model), config.mesh, mesh)
        batch = _packed_pairs(mesh, training, settings.packed_length, runs_as.attention)
    else:
        shape = (training.batch_size, 2, training.max_length)
        batch = {"tokens": _rows(mesh, shape, jnp.int32), "lengths": _rows(mesh, shape[:2], jnp.int32)}
    loss = functools.partial(pair_loss_sums, margin=settings.margin, centering=settings.centering)
    return _supervised(config, mesh, "reward_step", settings.model, training, True, loss, batch)


def _dpo(config: ExperimentConfig) -> DpoConfig:
    assert config.dpo is not None, "an experiment without a `dpo:` section has none of its programs"
    return config.dpo


def _dpo_step(config: ExperimentConfig, mesh: Mesh) -> Program:
    settings, shape = _dpo(config), _shape(config, config.sft.model)
    training = settings.training
    # As the stage has it: by the attention that scored the reference.
    judged = judging_shape(shape, config.mesh, mesh)
    runs_as = dataclasses.replace(training_shape(shape, config.mesh, mesh), attention=judged.attention)
    if settings.packed_length:
        batch = _packed_pairs(mesh, training, settings.packed_length, runs_as.attention)
        batch |= {"targets": batch["tokens"], "reference": _rows(mesh, batch["ends"].shape, jnp.float32)}
    else:
        batch = _pairs(mesh, training) | {"reference": _rows(mesh, (training.batch_size, 2), jnp.float32)}
    loss = functools.partial(dpo_loss_sums, settings=settings)
    return _supervised(config, mesh, "dpo_step", config.sft.model, training, False, loss, batch, runs_as)


def _dpo_reference(config: ExperimentConfig, mesh: Mesh) -> Program:
    """The SFT model's log-probs of a batch of pairs, in float32 as it was loaded to be trained."""
    settings, shape = _dpo(config), _shape(config, config.sft.model)
    params = _loaded(mesh, shape, False, jnp.float32)
    arguments = (params, _pairs(mesh, settings.training), judging_shape(shape, config.mesh, mesh))
    return Program(
        "dpo_reference", _response_logprobs, (*arguments, settings.length_normalized), device_bytes(params), 0, 0,
        ("dpo.training.batch_size", "dpo.training.max_length", "mesh.fsdp", "mesh.tensor"),
    )  # fmt: skip


def _pairs(mesh: Mesh, training: TrainingConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What `dpo.pair_batch` makes of pairs of the longest texts."""
    shape = (training.batch_size, 2, training.max_length)
    return {"tokens": _rows(mesh, shape, jnp.int32), "targets": _rows(mesh, shape, jnp.bool_)}


def _packed_pairs(
    mesh: Mesh, training: TrainingConfig, packed_length: int, attention: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `PackedRows.batch` makes of pairs of the longest texts that begin with nothing alike."""
    length = max(packed_length, 2 * training.max_length)
    fitting, split = length // (2 * training.max_length), training.micro_batches * row_parts(mesh)
    rows = -(-training.batch_size // (fitting * split)) * split
    names = ["tokens", "positions", "segment_ids"]
    if attention != "splash":
        names.append("seen_ids")
    return {name: _rows(mesh, (rows, length), jnp.int32) for name in names} | {
        "ends": _rows(mesh, (rows, fitting, 2), jnp.int32), "present": _rows(mesh, (rows, fitting), jnp.bool_)
    }  # fmt: skip


def _ppo_update(config: ExperimentConfig, mesh: Mesh) -> Program:
    ppo, players = config.ppo, _players(config)
    policy, critic = players.policy, players.critic
    policy_optimizer, critic_optimizer = make_optimizers(ppo)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    state = PpoState(
        _state(config, mesh, policy, policy_optimizer, False),
        _state(config, mesh, critic, critic_optimizer, True),
        scalar,
    )
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    players = training_players(players, config.mesh, mesh)
    spread = training_spread(
        config.mesh, mesh, {"policy": placement.policy.params, "critic": placement.critic.params}
    )
    update = make_update(players, ppo, policy_optimizer, critic_optimizer, True, placement, spread)
    rows = ppo.batch_size // ppo.num_mini_batches
    trees = (state.policy.params, state.critic.params)
    # Rollouts that are made while a step's updates run come from copies.
    ahead = ppo.overlap_rollouts and mesh.size == 1
    moments = (state.policy.opt_state, state.critic.opt_state)
    return Program(
        "ppo_update", update, (state, _experience(config, mesh), _rows(mesh, (rows,), jnp.int32)),
        device_bytes(trees), device_bytes(moments), 0,
        beside=device_bytes(_frozen(config, mesh)) + (device_bytes(trees) if ahead else 0),
        knobs=("ppo.micro_batches", "ppo.num_mini_batches", "ppo.batch_size", "mesh.remat", "mesh.explicit",
               "mesh.fsdp", "ppo.frozen_dtype"),
    )  # fmt: skip


def _frozen(config: ExperimentConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Reference (None where no run of PPO has one) and reward model, as PPO keeps them."""
    players, frozen = _players(config), config.ppo.frozen_dtype
    dtype = config.compute_dtype if frozen == "compute" else frozen
    measured = config.ppo.uses_reference or config.over_optimisation is not None
    reference = _loaded(mesh, players.policy, False, dtype) if measured else None
    return reference, _loaded(mesh, players.reward, True, dtype)


def _players(config: ExperimentConfig) -> Players:
    policy, reward = _shape(config, config.sft.model), _shape(config, config.reward.model)
    return Players(
        policy=policy, critic=reward if config.ppo.critic == "reward_model" else policy, reward=reward,
        temperature=config.ppo.sampling.temperature, eos_id=2,
        reward_mean=0.0, reward_std=1.0, value_shift=0.0, value_scale=1.0,
    )  # fmt: skip


def _ppo_judge(config: ExperimentConfig, mesh: Mesh) -> Program:
    """All four models over a step's rollouts: policy and critic as they are trained, the frozen ones as they lie."""
    ppo, players, settings = config.ppo, _players(config), config.mesh
    judging = dataclasses.replace(
        players,
        policy=judging_shape(players.policy, settings, mesh),
        critic=judging_shape(players.critic, settings, mesh),
        reward=judging_shape(players.reward, settings, mesh),
    )

    policy_optimizer, critic_optimizer = make_optimizers(ppo)
    policy = _state(config, mesh, players.policy, policy_optimizer, False)
    critic = _state(config, mesh, players.critic, critic_optimizer, True)
    reference, reward = _frozen(config, mesh)
    trees = (policy.params, reference, critic.params, reward)
    rows, answer = ppo.batch_size, (ppo.batch_size, ppo.sampling.max_new_tokens)
    samples = Samples(
        tokens=_rows(mesh, answer, jnp.int32), logprobs=_rows(mesh, answer, jnp.float32),
        lengths=_rows(mesh, (rows,), jnp.int32), content=_rows(mesh, (rows,), jnp.int32),
        stopped=_rows(mesh, (rows,), jnp.bool_),
    )  # fmt: skip
    prompts = _rows(mesh, (rows, ppo.max_prompt_length), jnp.int32), _rows(mesh, (rows,), jnp.int32)
    parts = ppo.judge_micro_batches or ppo.num_mini_batches * ppo.micro_batches
    return Program(
        "ppo_judge", judge, (*trees, *prompts, samples, judging, parts), device_bytes(trees), 0, 0,
        ("ppo.judge_micro_batches", "ppo.batch_size", "ppo.frozen_dtype", "mesh.fsdp"),
        beside=device_bytes((policy.opt_state, critic.opt_state)),
    )  # fmt: skip


def _experience(config: ExperimentConfig, mesh: Mesh) -> Experience:
    ppo = config.ppo
    answer = ppo.sampling.max_new_tokens
    widths: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((ppo.max_prompt_length + answer,), jnp.int32),
        "prompt_lengths": ((), jnp.int32),
        "lengths": ((), jnp.int32),
        "responses": ((answer,), jnp.int32),
    }
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Experience):
        width, dtype = widths.get(field.name, ((answer,), jnp.float32))
        fields[field.name] = _rows(mesh, (ppo.batch_size, *width), dtype)
    return Experience(**fields)


def _score_reward(config: ExperimentConfig, mesh: Mesh) -> Program:
    shape = _shape(config, config.reward.model)
    params = _loaded(mesh, shape, True, config.compute_dtype)
    # Comparisons are cut at the reward model's limit, dialogues of self-play are scored whole.
    _, dialogue = _row_lengths(config, config.demonstrations.sampling.max_new_tokens, "demonstrations")
    rows, length = config.reward.training.batch_size, max(config.reward.training.max_length, dialogue)
    arguments = (params, _rows(mesh, (rows, length), jnp.int32), _rows(mesh, (rows,), jnp.int32))
    speaks = config.demonstrations.assistant.model
    lasting = speaks == config.demonstrations.user.model
    return Program(
        "score_reward", _sequence_scores, (params, shape, *arguments[1:]), device_bytes(params), 0, 0,
        (
            "reward.training.batch_size", "demonstrations.max_turns", "demonstrations.sampling.max_new_tokens",
            "mesh.fsdp", "mesh.tensor",
        ),
        beside=sum(_speaks(config, mesh, speaks)) + _kept(config, mesh) if lasting else 0,
    )  # fmt: skip


def _speaks(config: ExperimentConfig, mesh: Mesh, model: str) -> tuple[int, int]:
    """Bytes of the model that speaks in self-play, and of its slots."""
    shape, sampling = _shape(config, model), config.demonstrations.sampling
    params = _loaded(mesh, shape, False, config.compute_dtype)
    _, slots = _row_lengths(config, sampling.max_new_tokens, "demonstrations")
    cache, _ = _cache(dataclasses.replace(shape, scan_layers=False), mesh, sampling.batch_size, slots)
    return device_bytes(params), device_bytes(cache)


def _kept(config: ExperimentConfig, mesh: Mesh) -> int:
    """Bytes of what a batch of dialogues' candidates keep for the next turn."""
    play = config.demonstrations
    if not play.reuse_cache or play.max_turns == 1 or play.assistant.model != play.user.model:
        return 0
    return play.n * _speaks(config, mesh, play.assistant.model)[1]


def _sampling(config: ExperimentConfig, mesh: Mesh, kind: str, model: str) -> Program:
    """Prefill writes a batch's prompts into the cache; decode adds one token to every row. Both own the cache."""
    # Layers unrolled, as sampling has them: a scan would hold the cache twice.
    shape = dataclasses.replace(_shape(config, model), scan_layers=False)
    section = "demonstrations" if model == config.demonstrations.assistant.model else "comparisons"
    settings = config.demonstrations.sampling if section == "demonstrations" else config.comparisons.sampling
    rows = settings.batch_size
    prompt, slots = _row_lengths(config, settings.max_new_tokens, section)
    params = _loaded(mesh, shape, False, config.compute_dtype)
    rules = SamplingRules(
        temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens, stop_tokens=(2,),
    )  # fmt: skip
    cache, formats = _cache(shape, mesh, rows, slots)

    def step(params: Any, cache: Any, tokens: Any, lengths: Any, keys: Any) -> Any:
        hidden, cache = hidden_states_cached(params, shape, tokens, cache, lengths)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        drawn, logprobs = draw(logits(params, shape, last)[:, 0], keys, rules)
        return drawn, logprobs, cache

    placement = jax.tree.map(lambda leaf: leaf.sharding, params)
    function = jax.jit(
        step,
        donate_argnums=1,
        in_shardings=(placement, formats, None, None, None),
        out_shardings=(None, None, formats),
    )
    beside = 0
    if section == "demonstrations":
        # Where candidates are scored as they come, the reward model stays.
        reward = _loaded(mesh, _shape(config, config.reward.model), True, config.compute_dtype)
        beside = device_bytes(reward) + _kept(config, mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    tokens = _rows(mesh, (rows, 1 if kind == "decode" else prompt), jnp.int32)
    arguments = (params, cache, tokens, _rows(mesh, (rows,), jnp.int32), keys)
    return Program(
        f"{kind}_{model}", function, arguments, device_bytes(params), 0, device_bytes(cache),
        (f"{section}.sampling.batch_size", f"{section}.sampling.max_new_tokens", "mesh.tensor", "mesh.fsdp"),
        shape.num_heads, shape.num_kv_heads, beside,
    )  # fmt: skip


def _row_lengths(config: ExperimentConfig, new_tokens: int, section: str) -> tuple[int, int]:
    """The tokens of the longest prompt that a row reads, and the slots that it needs in all.

    A query, and in self-play all turns before the last answer.
    """
    prompt = config.ppo.max_prompt_length
    if section == "demonstrations":
        before = config.demonstrations.max_turns - 1
        prompt += before * (new_tokens + config.demonstrations.user_sampling.max_new_tokens)
    return prompt, prompt + new_tokens


def _cache(shape: LlamaConfig, mesh: Mesh, rows: int, slots: int) -> tuple[Any, Any]:
    """An abstract cache, split over rows and key/value heads, and formats that leave its layout to the compiler."""
    tree = jax.eval_shape(lambda: empty_cache(shape, rows, slots))
    rules = rules_for(mesh)
    split = mesh.shape[str(dict(rules)["activation_kv_heads"])]

    def spec(leaf: Any) -> jax.sharding.PartitionSpec:
        names: list[Any] = [None] * leaf.ndim
        # [L, B, slots, heads, H] in some order of the last three; lengths are [B].
        names[leaf.ndim - 4 if leaf.ndim > 1 else 0] = "rows"
        if leaf.ndim > 1 and shape.num_kv_heads % split == 0:
            names[[i for i in range(leaf.ndim - 3, leaf.ndim) if leaf.shape[i] == shape.num_kv_heads][0]] = (
                "activation_kv_heads"
            )
        return partition_spec(names, rules)

    where = jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, spec(leaf)), tree)
    formats = jax.tree.map(lambda leaf, s: Format(Layout.AUTO, s) if leaf.ndim > 1 else s, tree, where)
    return _placed(tree, where), formats
