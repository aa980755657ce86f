"""What applying the head in parts of the vocabulary costs in time and saves in memory.

    python tests/benchmarks/bench_vocabulary.py [--rows 4] [--length 256] [--layers 4] [--chunks 0 8192]

Of SmolLM2-135M's width and vocabulary, float32: loss and gradient of the head alone, best of some runs in alternation,
and the compiler's memory of a whole SFT step and PPO update with fewer layers (`temp_size_in_bytes`: all that a program
needs beside its arguments and results).
"""

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from almost_jax.config import OptimizerConfig, PpoConfig
from almost_jax.core.heads import add_head
from almost_jax.core.llama import LlamaConfig, Params, init_params
from almost_jax.core.losses import target_sums
from almost_jax.core.train import init_state, make_optimizer, make_train_step
from almost_jax.core.vocabulary import hidden_figures
from almost_jax.stages.rollouts import Experience, Players
from almost_jax.stages.sft import sft_loss_sums
from almost_jax.stages.updates import PpoState, make_optimizers, make_update

SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tie_embeddings=True,
)
REPEATS = 5


def struct(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def head_time(shapes: dict[int, LlamaConfig], rows: int, length: int) -> dict[int, float]:
    """Seconds of the head's loss and gradient per chunk size, the best of some runs in alternation."""
    table = 0.02 * jax.random.normal(jax.random.key(0), (SHAPE.vocab_size, SHAPE.hidden_size), jnp.float32)
    hidden = jax.random.normal(jax.random.key(1), (rows, length, SHAPE.hidden_size), jnp.float32)
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, SHAPE.vocab_size, jnp.int32)

    def loss(table: jax.Array, hidden: jax.Array, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
        figures = hidden_figures({"embedding": table}, config, hidden, tokens, 1.0, with_entropy=False)
        return target_sums(figures, jnp.ones(tokens.shape, bool))[0]

    steps = {
        chunk: jax.jit(functools.partial(jax.value_and_grad(loss, (0, 1)), config=shape))
        for chunk, shape in shapes.items()
    }
    best = dict.fromkeys(shapes, np.inf)
    for turn in range(REPEATS + 1):
        for chunk, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step(table, hidden, tokens))
            if turn:
                best[chunk] = min(best[chunk], time.perf_counter() - began)
    return best


def sft_memory(shape: LlamaConfig, rows: int, length: int) -> int:
    optimizer = make_optimizer(OptimizerConfig(), 10)
    step: Any = make_train_step(functools.partial(sft_loss_sums, config=shape, z_loss=0.0), optimizer)
    state = jax.eval_shape(lambda: init_state(init_params(shape, jax.random.key(0)), optimizer))
    batch = {"tokens": struct(jnp.int32, rows, length), "targets": struct(jnp.bool_, rows, length)}
    return int(step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes)


def ppo_memory(shape: LlamaConfig, rows: int, length: int) -> int:
    """Prompts take a quarter of each row."""
    ppo = PpoConfig()
    optimizers = make_optimizers(ppo)
    policy: Params = jax.eval_shape(lambda: init_params(shape, jax.random.key(0)))
    critic = jax.eval_shape(lambda tree: add_head(tree, shape, jax.random.key(0)), policy)
    state = jax.eval_shape(
        lambda policy, critic: PpoState(
            init_state(policy, optimizers[0]), init_state(critic, optimizers[1]), jnp.float32(0.1)
        ),
        policy,
        critic,
    )
    answer = length - length // 4
    fields = {field.name: struct(jnp.float32, rows, answer) for field in dataclasses.fields(Experience)}
    fields |= {"tokens": struct(jnp.int32, rows, length), "responses": struct(jnp.int32, rows, answer)}
    fields |= {name: struct(jnp.int32, rows) for name in ("prompt_lengths", "lengths")}
    players = Players(
        policy=shape, critic=shape, reward=shape, temperature=1.0, eos_id=2, reward_mean=0.0,
        reward_std=1.0, value_shift=0.0, value_scale=1.0,
    )  # fmt: skip
    update: Any = make_update(players, ppo, *optimizers, True, None)
    compiled = update.lower(state, Experience(**fields), struct(jnp.int32, rows)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def main() -> None:
    """Print one line for each chunk size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 8192])
    options = parser.parse_args()
    shapes = {
        chunk: dataclasses.replace(SHAPE, num_layers=options.layers, vocab_chunk=chunk) for chunk in options.chunks
    }
    size = options.rows, options.length
    print(f"{size[0]} x {size[1]} tokens, vocabulary {SHAPE.vocab_size}, {options.layers} layers, {jax.devices()[0]}")
    seconds = head_time(shapes, *size)
    for chunk, shape in shapes.items():
        sft, ppo = (memory(shape, *size) / 1e6 for memory in (sft_memory, ppo_memory))
        print(
            f"vocab_chunk {chunk:>6}: head, loss and gradient {seconds[chunk]:.3f} s; "
            f"SFT step {sft:,.0f} MB, PPO update {ppo:,.0f} MB beside arguments"
        )


if __name__ == "__main__":
    main()
