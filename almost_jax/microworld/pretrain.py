"""Pretrain the micro-world's three vanilla models on raw transcripts, as LLaMA was on the web."""

import dataclasses
import random
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from almost_jax.config import OptimizerConfig
from almost_jax.core.llama import LlamaConfig, Params, hidden_states, init_params, logits, unstack_layers
from almost_jax.core.rotary import RopeConfig
from almost_jax.core.train import Batch, init_state, make_optimizer, make_train_step
from almost_jax.microworld.answers import transcript, vocabulary
from almost_jax.microworld.world import KINDS

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)
CONTEXT = 208
QUERY_WEIGHT = 0.1
# Copying forms early only when it is seen often.
EARLY_KINDS = {kind: share * (3.0 if kind in ("copy", "reverse", "last") else 1.0) for kind, share in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of pretraining: `steps` of `rows` transcripts, each `length` tokens long."""

    steps: int
    rows: int
    length: int
    early: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model of the micro-world and how it is trained."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    phases: tuple[Phase, ...]
    learning_rate: float

    def config(self, vocab_size: int) -> LlamaConfig:
        """The model's shape: four query heads over two key/value heads, tied embeddings."""
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=self.hidden_size // 4,
            rope=RopeConfig(theta=10000.0),
            tie_embeddings=True,
            max_position_embeddings=CONTEXT + 48,
            initializer_range=self.hidden_size**-0.5 / 2,
        )


RECIPES = {
    "small": Recipe(64, 2, 176, (Phase(400, 64, 48, True), Phase(1200, 16, CONTEXT)), 4e-3),
    "medium": Recipe(96, 3, 256, (Phase(480, 64, 48, True), Phase(1200, 16, CONTEXT)), 4e-3),
    "large": Recipe(128, 4, 352, (Phase(500, 64, 48, True), Phase(1300, 16, CONTEXT)), 2.5e-3),
}


def word_ids() -> dict[str, int]:
    """The vocabulary: special tokens first (padding is 0), then the world's words, sorted."""
    return {word: index for index, word in enumerate([*SPECIAL_TOKENS, *vocabulary()])}


def encode_transcript(
    turns: Sequence[tuple[str, str]], ids: dict[str, int], length: int
) -> tuple[list[int], list[float]]:
    """Tokens of "<bos> Human: q Assistant: r Human: ... <eos>" and the loss weight of each, cut at `length`.

    What the assistant says, and the token that ends it, weigh 1; what the human says weighs `QUERY_WEIGHT`.
    """
    tokens, weights = [BOS], [0.0]
    for query, response in turns:
        # A turn's first "Human:" ends the response before it.
        asked = [*query.split(), "Assistant:"]
        for words, weight in ((["Human:"], 1.0), (asked, QUERY_WEIGHT), (response.split(), 1.0)):
            tokens += [ids[word] for word in words]
            weights += [weight] * len(words)
    tokens.append(EOS)
    weights.append(1.0)
    return tokens[:length], weights[:length]


def make_batch(phase: Phase, ids: dict[str, int], seed: str) -> dict[str, np.ndarray]:
    """One batch of raw transcripts, a function of the seed: tokens [B, T] int32 and weights [B, T] float32."""
    rng = random.Random(seed)
    tokens = np.full((phase.rows, phase.length), PAD, np.int32)
    weights = np.zeros((phase.rows, phase.length), np.float32)
    for row in range(phase.rows):
        turns = transcript(rng, rng.randint(2, 4 + phase.length // 24), EARLY_KINDS if phase.early else KINDS)
        found, weight = encode_transcript(turns, ids, phase.length)
        tokens[row, : len(found)], weights[row, : len(found)] = found, weight
    return {"tokens": tokens, "weights": weights}


def pretrain(
    recipe: Recipe, seed: int, report: Callable[[int, int, dict[str, float]], None]
) -> tuple[LlamaConfig, Params]:
    """Train one vanilla model from nothing.

    Args:
        recipe: its shape and schedule.
        seed: decides the parameters' start and every transcript.
        report: called with (step, steps, metrics) every 50 steps.

    Returns:
        The config and float32 parameters.
    """
    ids = word_ids()
    config = recipe.config(len(ids))
    unrolled = dataclasses.replace(config, scan_layers=False)
    total = sum(phase.steps for phase in recipe.phases)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=recipe.learning_rate, schedule="cosine", warmup_steps=50, b2=0.98, weight_decay=0.01,
            final_fraction=0.02,
        ),
        total,
    )  # fmt: skip

    def loss_sums(params: Params, batch: Batch) -> tuple[Array, tuple[Array, dict[str, tuple[Array, Array]]]]:
        # Unrolled layers train faster on a CPU than scanned ones.
        params = unstack_layers(params, config.num_layers)
        hidden = hidden_states(params, unrolled, batch["tokens"][:, :-1])
        scores = jax.nn.log_softmax(logits(params, unrolled, hidden), axis=-1)
        targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
        picked = jnp.take_along_axis(scores, targets[:, :, None], axis=-1)[:, :, 0]
        return -jnp.sum(picked * weights), (jnp.sum(weights), {})

    state = init_state(init_params(config, jax.random.key(seed)), optimizer)
    step = make_train_step(loss_sums, optimizer, state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    done = 0
    for phase in recipe.phases:
        for _ in range(phase.steps):
            batch = {name: jnp.asarray(array) for name, array in make_batch(phase, ids, f"{seed}/{done}").items()}
            state, metrics = step(state, batch)
            done += 1
            if done % 50 == 0 or done == total:
                report(done, total, {name: float(value) for name, value in metrics.items()})
    return config, state.params
