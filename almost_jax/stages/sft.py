"""Supervised fine-tuning on demonstrations: cross-entropy on the assistant's tokens only, in all of its turns.

Source: ALMoST (arXiv 2305.13735), section 2.3. Each assistant turn ends by the end of text, which is a target too.

Packed or not, a step learns from the same demonstrations, so packing changes how fast it is and nothing else: positions
count from each demonstration's start, attention stays inside it, and losses are divided by the batch's targets.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almost_jax.core.llama import LlamaConfig, Params, hidden_states
from almost_jax.core.losses import LossTerms, masked_sum, shifted, target_sums
from almost_jax.core.partitioning import platform, row_parts, whole_rows
from almost_jax.core.train import Batch
from almost_jax.core.vocabulary import hidden_figures
from almost_jax.errors import InputError
from almost_jax.io.batches import batch_indices, enough_rows, first_fit, pad, row_counts
from almost_jax.io.models import save_model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.sampling.layout import decode_layout
from almost_jax.stages.demonstrations import demonstration_turns, is_answered
from almost_jax.stages.dialogues import training_tokens
from almost_jax.stages.execution import judging_shape, training_shape
from almost_jax.stages.reward import place_of_group
from almost_jax.stages.training import count_steps, fit, fixed_length, place_batch, row_limit

# Token ids, and for each of them whether it is a target.
Example: TypeAlias = tuple[Sequence[int], Sequence[bool]]


def run_stage(run: Run) -> dict[str, Any]:
    """Fine-tune on the guided demonstrations, and on plain self-play for the baseline -> sft(_self_play)/model."""
    summary = {"sft": fine_tune(run, "sft", "demonstrations.jsonl")}
    if run.config.demonstrations.baseline:
        summary["sft_self_play"] = fine_tune(run, "sft_self_play", "demonstrations_self_play.jsonl")
    return summary


def fine_tune(run: Run, name: str, file: str) -> dict[str, Any]:
    """Train the config's model on one file of demonstrations and save it as NAME/model.

    Raises:
        InputError: no demonstration fits into `sft.training.max_length`, or none is left beside `sft.held_out`.
    """
    config = run.config.sft
    training = config.training
    source = run.model_to_train(config.model)
    records = read_records(run.path(file))
    demonstrations = [record for record in records if is_answered(record)]
    if not demonstrations:
        raise InputError(f"{run.path(file)}: none of {len(records)} dialogues ends with an answer to learn from")
    examples = [training_tokens(source.tokenizer, demonstration_turns(record)) for record in demonstrations]
    limit = row_limit(training, source.config)
    fits = [place for place, (tokens, _) in enumerate(examples) if len(tokens) <= limit]
    if not fits:
        raise InputError(
            f"sft.training.max_length: none of {len(examples)} demonstrations fits into {limit} tokens"
        )
    if config.held_out >= len(fits):
        raise InputError(f"sft.held_out: {config.held_out} leaves none of {len(fits)} demonstrations; hold out fewer")
    # By their queries, so that both models are judged by demonstrations of the same ones, where both have them.
    hidden = run.seed("sft/held_out")
    order = sorted(fits, key=lambda place: place_of_group(demonstrations[place]["query_id"], hidden))
    kept_out = frozenset(order[: config.held_out])
    whole = [examples[place] for place in fits]
    fitting = [examples[place] for place in fits if place not in kept_out]
    test = [examples[place] for place in fits if place in kept_out]
    too_long = len(examples) - len(fits)
    held_out = f" to train on, {len(test)} held out" if test else ""
    run.say(f"{name}: {len(fitting)} demonstrations{held_out}, {too_long} too long")
    # The seed is not the stage's: of as many demonstrations both models see theirs in the same order.
    seed = run.seed("sft/batches")
    total_steps = count_steps(training, len(fitting))
    lengths = [len(tokens) for tokens, _ in fitting]
    length = fixed_length(max(len(tokens) for tokens, _ in whole))

    def chosen_at(step: int) -> list[int]:
        return [int(index) for index in batch_indices(step, training.batch_size, len(fitting), seed)]

    if config.packed_length:
        needed = [
            len(first_fit([lengths[index] for index in chosen_at(step)], config.packed_length))
            for step in range(total_steps)
        ]
        # Numbers of rows that every device and every micro-batch can have its share of.
        counts = row_counts(needed, training.micro_batches * row_parts(run.mesh))
        spent = config.packed_length * statistics.fmean(enough_rows(counts, rows) for rows in needed)
        run.say(
            f"{name}: {training.batch_size} demonstrations in {' or '.join(map(str, counts))} rows of "
            f"{config.packed_length} tokens a step"
        )
    else:
        spent = training.batch_size * length

    def batch_at(step: int) -> dict[str, np.ndarray]:
        chosen = [fitting[index] for index in chosen_at(step)]
        if config.packed_length:
            rows = enough_rows(counts, needed[step])
            return packed_batch(chosen, rows, config.packed_length, source.tokenizer.pad_id)
        return example_batch(chosen, length, source.tokenizer.pad_id)

    shape = training_shape(source.config, run.config.mesh, run.mesh)
    loss_sums = functools.partial(sft_loss_sums, config=shape, z_loss=config.z_loss)
    judging = judging_shape(source.config, run.config.mesh, run.mesh)

    def evaluate(params: Params) -> dict[str, float]:
        found: dict[str, float] = {}
        # Packed, a step needn't have a number of demonstrations that the mesh can split.
        size = whole_rows(run.mesh, training.batch_size)
        for first in range(0, len(test), size):
            part = test[first : first + size]
            # Rows without a target fill the last batch up.
            rows = [*part, *[([source.tokenizer.pad_id], [False])] * (size - len(part))]
            batch = place_batch(example_batch(rows, length, source.tokenizer.pad_id), run.mesh)
            total, (number, metrics) = _held_out_sums(params, batch, config=judging, z_loss=0.0)
            for key, value in {"loss": total, "targets": number, **{k: pair[0] for k, pair in metrics.items()}}.items():
                found[key] = found.get(key, 0.0) + float(value)
        return {f"held_out_{key}": value / found["targets"] for key, value in found.items() if key != "targets"}

    state = fit(run, name, source.params, source.config, loss_sums, batch_at, total_steps, training, evaluate)
    with jax.set_mesh(run.mesh):
        last = {"held_out": len(test), **evaluate(state.params)} if test else {}
    save_model(
        run.path(name, "model"), dataclasses.replace(source, params=state.params, name=f"{run.config.name}/{name}")
    )
    return {
        "demonstrations": len(fitting),
        "too_long": too_long,
        **last,
        "tokens": sum(lengths),
        "targets": sum(sum(targets) for _, targets in fitting),
        "steps": total_steps,
        # The share of what a step computes on that is no padding.
        "fill": training.batch_size * sum(lengths) / len(lengths) / spent,
    }


def example_batch(examples: Sequence[Example], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Tokens and targets as arrays, a row each: tokens [B, T] int32, targets [B, T] bool."""
    tokens, _ = pad([tokens for tokens, _ in examples], length, pad_id)
    targets, _ = pad([targets for _, targets in examples], length, 0)
    return {"tokens": tokens, "targets": targets.astype(bool)}


def packed_batch(examples: Sequence[Example], rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Examples packed into rows by `io.batches.first_fit`.

    Args:
        examples: tokens and targets; an example's first token is never a target, since nothing before it predicts it.
        rows: R, at least as many as `first_fit` needs; those that are not needed stay empty.
        length: T, tokens per row.
        pad_id: what fills the rest.

    Returns:
        tokens, positions and segment_ids [R, T] int32, targets [R, T] bool. Segments count from 1 in each row; padding
        is segment 0, so that it sees no example and none sees it.

    Raises:
        InputError: an example is longer than a row, or there are too few rows.
        ValueError: an example's first token is a target.
    """
    packed = first_fit([len(tokens) for tokens, _ in examples], length)
    if len(packed) > rows:
        raise InputError(f"{len(examples)} demonstrations need {len(packed)} rows of {length} tokens, not {rows}")
    tokens = np.full((rows, length), pad_id, np.int32)
    positions, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    targets = np.zeros((rows, length), bool)
    for row, places in enumerate(packed):
        start = 0
        for segment, place in enumerate(places, start=1):
            own, wanted = examples[place]
            if len(wanted) and wanted[0]:
                raise ValueError(f"the first token of example {place} can't be a target: nothing before it predicts it")
            here = slice(start, start + len(own))
            tokens[row, here], targets[row, here] = own, wanted
            positions[row, here], segments[row, here] = np.arange(len(own)), segment
            start += len(own)
    return {"tokens": tokens, "positions": positions, "segment_ids": segments, "targets": targets}


def sft_loss_sums(params: Params, batch: Batch, *, config: LlamaConfig, z_loss: float) -> LossTerms:
    """Cross-entropy of the batch's targets.

    Args:
        params: the model's tree.
        batch: from `example_batch` or `packed_batch`.
        config: the model's shape.
        z_loss: weight of the mean of log(Z)^2 over targets, Z being the softmax's denominator (Chowdhery et al. 2022,
            PaLM, section 5); 0 leaves it out.

    Returns:
        Sum of losses in nats, number of targets, metrics.
    """
    flat, config = decode_layout(params, config, platform())
    states = hidden_states(
        flat, config, batch["tokens"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
    )
    figures = hidden_figures(flat, config, states, shifted(batch["tokens"]), 1.0, with_entropy=False)
    targets = shifted(batch["targets"])
    total, (number, metrics) = target_sums(figures, targets)
    if z_loss:
        squares = masked_sum(jnp.square(figures.logsumexp), targets)
        total, metrics = total + z_loss * squares, {**metrics, "z_squared": (squares, number)}
    return total, (number, metrics)


_held_out_sums = jax.jit(sft_loss_sums, static_argnames=("config", "z_loss"))
