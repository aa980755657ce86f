"""What the shipped programs hold in memory, read from their jaxprs: never the logits of whole rows."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from almost_jax.config import MeshConfig, OptimizerConfig, PpoConfig
from almost_jax.core.heads import add_head
from almost_jax.core.llama import LlamaConfig, Params, init_params
from almost_jax.core.partitioning import lowering_for, make_mesh
from almost_jax.core.train import init_state, make_optimizer, make_train_step
from almost_jax.sampling.rows import Samples
from almost_jax.sampling.scoring import _next_token_logprobs
from almost_jax.stages.execution import head_chunk, training_shape
from almost_jax.stages.rollouts import Experience, Players, judge
from almost_jax.stages.sft import sft_loss_sums
from almost_jax.stages.updates import PpoState, make_optimizers, make_update

# The vocabulary is large beside everything else, and not a multiple of the chunk.
SHAPE = LlamaConfig(
    vocab_size=1009, hidden_size=12, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
B, P, G = 4, 9, 13


def avals(jaxpr: Any) -> Iterator[Any]:
    """The shape of every value in a program and in all programs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from avals(inner)


def largest(function: Any, *arguments: Any) -> int:
    traced = function.trace(*arguments) if hasattr(function, "trace") else jax.make_jaxpr(function)(*arguments)
    return max(aval.size for aval in avals(traced.jaxpr) if hasattr(aval, "size"))


def struct(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def trees(config: LlamaConfig) -> tuple[Params, Params]:
    policy: Params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return policy, jax.eval_shape(lambda tree: add_head(tree, config, jax.random.key(0)), policy)


def players(config: LlamaConfig) -> Players:
    return Players(
        policy=config, critic=config, reward=config, temperature=0.7, eos_id=2, reward_mean=0.0,
        reward_std=1.0, value_shift=0.0, value_scale=1.0,
    )  # fmt: skip


def sft_step(config: LlamaConfig) -> int:
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step = make_train_step(lambda params, batch: sft_loss_sums(params, batch, config=config, z_loss=0.0), optimizer)
    state = jax.eval_shape(lambda: init_state(init_params(config, jax.random.key(0)), optimizer))
    return largest(step, state, {"tokens": struct(B, G, dtype=jnp.int32), "targets": struct(B, G, dtype=jnp.bool_)})


def ppo_update(config: LlamaConfig) -> int:
    ppo = PpoConfig(entropy_coef=0.01)
    optimizers = make_optimizers(ppo)
    policy, critic = trees(config)
    state = jax.eval_shape(
        lambda policy, critic: PpoState(
            init_state(policy, optimizers[0]), init_state(critic, optimizers[1]), jnp.float32(0.1)
        ),
        policy,
        critic,
    )
    fields = {field.name: struct(B, G) for field in dataclasses.fields(Experience)}
    fields |= {"tokens": struct(B, P + G, dtype=jnp.int32), "responses": struct(B, G, dtype=jnp.int32)}
    fields |= {name: struct(B, dtype=jnp.int32) for name in ("prompt_lengths", "lengths")}
    update = make_update(players(config), ppo, *optimizers, True, None)
    return largest(update, state, Experience(**fields), struct(B, dtype=jnp.int32))


def judging(config: LlamaConfig) -> int:
    policy, critic = trees(config)
    samples = Samples(
        tokens=struct(B, G, dtype=jnp.int32), logprobs=struct(B, G), lengths=struct(B, dtype=jnp.int32),
        content=struct(B, dtype=jnp.int32), stopped=struct(B, dtype=jnp.bool_),
    )  # fmt: skip
    prompts, lengths = struct(B, P, dtype=jnp.int32), struct(B, dtype=jnp.int32)

    def run(policy: Params, critic: Params, prompts: Any, lengths: Any, samples: Samples) -> Any:
        return judge(policy, policy, critic, critic, prompts, lengths, samples, players(config), 1)

    return largest(run, policy, critic, prompts, lengths, samples)


def scoring(config: LlamaConfig) -> int:
    policy, _ = trees(config)

    def run(params: Params, tokens: Any) -> Any:
        return _next_token_logprobs(params, config, tokens, 1.0)

    return largest(run, policy, struct(B, G + 1, dtype=jnp.int32))


@pytest.mark.parametrize("program", [sft_step, ppo_update, judging, scoring])
@pytest.mark.parametrize("tied", [True, False])
def test_no_program_holds_logits_of_batch_x_length_x_vocabulary(program: Any, tied: bool) -> None:
    whole = dataclasses.replace(SHAPE, tie_embeddings=tied)
    assert program(whole) >= B * G * 1009, "in one piece they are there, or this test sees nothing"
    assert program(dataclasses.replace(whole, vocab_chunk=100)) < B * G * 1009 // 3


def test_a_cpu_has_the_head_in_one_piece_and_attention_in_blocks_unless_asked() -> None:
    asked = MeshConfig(vocab_chunk_cpu=11, vocab_chunk=77)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert head_chunk(MeshConfig()) == 0
    assert training_shape(SHAPE, asked, mesh).vocab_chunk == 11
    # No more is kept of a long row's attention than it must be; a TPU has its kernel.
    assert training_shape(SHAPE, asked, mesh).attention == "blocks"
    assert training_shape(SHAPE, asked.model_copy(update={"attention": "plain"}), mesh).attention == "plain"
    with lowering_for("tpu"):
        assert training_shape(SHAPE, asked, mesh).attention == "splash"
        assert head_chunk(MeshConfig()) == 8192
        assert training_shape(SHAPE, asked, mesh).vocab_chunk == 77
