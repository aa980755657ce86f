"""Supervised fine-tuning on demonstrations: cross-entropy on the assistant's tokens only, in all of its turns.

Source: ALMoST (arXiv 2305.13735), section 2.3. Each assistant turn ends by the end of text, which is a target too.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from almost_jax.core.llama import LlamaConfig, Params, hidden_states
from almost_jax.core.losses import LossTerms, shifted, target_sums
from almost_jax.core.partitioning import platform
from almost_jax.core.train import Batch, make_optimizer, make_train_step
from almost_jax.core.vocabulary import hidden_figures
from almost_jax.errors import InputError
from almost_jax.io.batches import batch_indices, pad
from almost_jax.io.models import save_model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.sampling.layout import decode_layout
from almost_jax.stages.demonstrations import demonstration_turns, is_answered
from almost_jax.stages.dialogues import training_tokens
from almost_jax.stages.execution import placed_for_training, training_shape, training_spread
from almost_jax.stages.training import count_steps, fit, fixed_length, fresh_state, shardings_of


def run_stage(run: Run) -> dict[str, Any]:
    """Fine-tune on the guided demonstrations, and on plain self-play for the baseline -> sft(_self_play)/model."""
    summary = {"sft": fine_tune(run, "sft", "demonstrations.jsonl")}
    if run.config.demonstrations.baseline:
        summary["sft_self_play"] = fine_tune(run, "sft_self_play", "demonstrations_self_play.jsonl")
    return summary


def fine_tune(run: Run, name: str, file: str) -> dict[str, Any]:
    """Train the config's model on one file of demonstrations and save it as NAME/model.

    Raises:
        InputError: no demonstration fits into `sft.training.max_length`.
    """
    config = run.config.sft
    training = config.training
    source = run.model_to_train(config.model)
    demonstrations = [record for record in read_records(run.path(file)) if is_answered(record)]
    examples = [training_tokens(source.tokenizer, demonstration_turns(record)) for record in demonstrations]
    fitting = [example for example in examples if len(example[0]) <= training.max_length]
    if not fitting:
        raise InputError(
            f"sft.training.max_length: none of {len(examples)} demonstrations fits into {training.max_length} tokens"
        )
    run.say(f"{name}: {len(fitting)} demonstrations, {len(examples) - len(fitting)} too long")
    length = fixed_length(max(len(tokens) for tokens, _ in fitting))
    # Both models see the same order, so that they differ by their demonstrations alone.
    seed = run.seed("sft/batches")

    def batch_at(step: int) -> dict[str, np.ndarray]:
        chosen = batch_indices(step, training.batch_size, len(fitting), seed)
        return example_batch([fitting[index] for index in chosen], length, source.tokenizer.pad_id)

    total_steps = count_steps(training, len(fitting))
    optimizer = make_optimizer(training.optimizer, total_steps)
    settings, mesh = run.config.mesh, run.mesh
    loss_sums = functools.partial(sft_loss_sums, config=training_shape(source.config, settings, mesh))
    with jax.set_mesh(mesh):
        state = fresh_state(placed_for_training(source.params, source.config, settings, mesh), optimizer, mesh)
        spread = training_spread(settings, mesh, shardings_of(state.params))
        skips = training.guards.non_finite == "skip"
        train_step = make_train_step(loss_sums, optimizer, training.micro_batches, shardings_of(state), spread, skips)
        state = fit(run, name, state, train_step, batch_at, total_steps, training, None)
    save_model(
        run.path(name, "model"), dataclasses.replace(source, params=state.params, name=f"{run.config.name}/{name}")
    )
    return {
        "demonstrations": len(fitting),
        "too_long": len(examples) - len(fitting),
        "tokens": sum(len(tokens) for tokens, _ in fitting),
        "targets": sum(sum(targets) for _, targets in fitting),
        "steps": total_steps,
    }


def example_batch(
    examples: Sequence[tuple[Sequence[int], Sequence[bool]]], length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Tokens and targets as arrays: tokens [B, T] int32, targets [B, T] bool."""
    tokens, _ = pad([tokens for tokens, _ in examples], length, pad_id)
    targets, _ = pad([targets for _, targets in examples], length, 0)
    return {"tokens": tokens, "targets": targets.astype(bool)}


def sft_loss_sums(params: Params, batch: Batch, *, config: LlamaConfig) -> LossTerms:
    """Cross-entropy of the batch's targets.

    Args:
        params: the model's tree.
        batch: from `example_batch`.
        config: the model's shape.

    Returns:
        Sum of losses in nats, number of targets, metrics.
    """
    flat, config = decode_layout(params, config, platform())
    states = hidden_states(flat, config, batch["tokens"])
    figures = hidden_figures(flat, config, states, shifted(batch["tokens"]), 1.0, with_entropy=False)
    return target_sums(figures, shifted(batch["targets"]))
