"""Fine-tuning on ragged dialogues, each in a row of its own against packed, on the micro-world's large model.

    make bench

Both sides take the same steps on the same demonstrations (a test holds that losses and gradients are equal), in turn,
after one round that compiles; rates count real tokens, padding left out, and are medians. Prints one JSON object.
"""

import functools
import json
import statistics
import time
from typing import Any

import jax
import numpy as np

from almost_jax.config import MeshConfig, OptimizerConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.train import make_optimizer, make_train_step
from almost_jax.io.batches import first_fit
from almost_jax.io.models import load_model
from almost_jax.stages.sft import Example, example_batch, packed_batch, sft_loss_sums
from almost_jax.stages.training import fixed_length, fresh_state, place_batch, shardings_of

ROUNDS, BATCH, PACKED_LENGTH, LONGEST = 5, 32, 256, 256


def examples(vocab: int) -> list[Example]:
    """Random tokens of lengths like those of dialogues: log-normal, median 60, cut at `LONGEST`."""
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(np.log(60), 0.7, BATCH)), 8, LONGEST).astype(int)
    lengths[0] = LONGEST
    return [
        (generator.integers(1, vocab, size).tolist(), [place >= size // 2 for place in range(size)]) for size in lengths
    ]


def main() -> None:
    """Time both sides and print the rates."""
    mesh = make_mesh(MeshConfig())
    model = load_model("microworld:large", mesh, "float32")
    given = examples(model.config.vocab_size)
    lengths = [len(tokens) for tokens, _ in given]
    rows = len(first_fit(lengths, PACKED_LENGTH))
    sides = {
        "packed": packed_batch(given, rows, PACKED_LENGTH, 0),
        "unpacked": example_batch(given, fixed_length(max(lengths)), 0),
    }
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"), 100)
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    with jax.set_mesh(mesh):
        states: dict[str, Any] = {name: fresh_state(model.params, optimizer, mesh) for name in sides}
        loss = functools.partial(sft_loss_sums, config=model.config, z_loss=0.0)
        steps = {name: make_train_step(loss, optimizer, 1, shardings_of(states[name])) for name in sides}
        for turn in range(ROUNDS + 1):
            for name, batch in sides.items():
                start = time.perf_counter()
                states[name], figures = steps[name](states[name], place_batch(batch, mesh))
                losses.setdefault(name, float(figures["loss"]))
                jax.block_until_ready(states[name])
                if turn:
                    times[name].append(time.perf_counter() - start)
    rates = {name: sum(lengths) / statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "benchmark": "packing",
                "shape": {name: list(batch["tokens"].shape) for name, batch in sides.items()},
                "fill": {name: round(sum(lengths) / batch["tokens"].size, 2) for name, batch in sides.items()},
                "first_loss": {name: round(value, 5) for name, value in losses.items()},
                "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
                "ratio": round(rates["packed"] / rates["unpacked"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
