"""Direct preference optimisation from the synthetic pairs: the baseline that needs neither reward model nor rollouts.

It starts from the SFT policy, which is also its reference, and learns from the same split of the kept pairs as the
reward model (where `dpo.held_out` and `dpo.training.max_length` are as the reward model's), so that within one run
RLSF can be told apart from simply learning its preferences. The reference's log-probs are computed once and kept in
reference.jsonl. Source: Rafailov et al. 2023.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from almost_jax.config import DpoConfig
from almost_jax.core.llama import LlamaConfig, Params, hidden_states
from almost_jax.core.losses import LossTerms, shifted
from almost_jax.core.partitioning import platform, replicated, row_parts
from almost_jax.core.preferences import preference_sums
from almost_jax.core.train import Batch
from almost_jax.core.vocabulary import hidden_figures
from almost_jax.errors import InputError
from almost_jax.io.batches import batch_indices, pad
from almost_jax.io.distributed import from_primary
from almost_jax.io.models import load_model, save_model
from almost_jax.io.records import RecordWriter, iter_records, read_records
from almost_jax.io.run import Run
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.layout import decode_layout
from almost_jax.stages.dialogues import training_tokens
from almost_jax.stages.execution import judging_shape, training_shape
from almost_jax.stages.pair_rows import (
    PackedRows,
    PairTokens,
    packed_rows,
    packed_states,
    say_of_packing,
    shared_size,
)
from almost_jax.stages.reward import Pair, check_any_kept, comparison_pair, split_pairs
from almost_jax.stages.sft import Example
from almost_jax.stages.templates import Turn
from almost_jax.stages.training import (
    count_steps,
    fit,
    fixed_length,
    place_batch,
    row_limit,
)

NAME = "dpo"
# What a pair's two texts, chosen before rejected, have as log-probs under the reference, in nats.
References: TypeAlias = Sequence[tuple[float, float]]


def run_stage(run: Run) -> dict[str, Any]:
    """Train on the kept pairs: queries.jsonl, comparisons.jsonl, sft/model -> dpo/model.

    Does nothing when the experiment has no `dpo:` section.

    Raises:
        InputError: a record or the SFT model is missing, no pair was kept, or none fits into `dpo.training.max_length`.
        TrainingDiverged: a figure is not finite.
        Preempted: SIGTERM came; the state is saved.
    """
    config = run.config.dpo
    if config is None:
        run.say(f"{NAME}: the experiment has no `dpo:` section, so this baseline is left out")
        return {"dpo": "off"}
    training = config.training
    source = load_model(str(run.path("sft", "model")), run.mesh, run.config.compute_dtype)
    tokenizer, pad_id = source.tokenizer, source.tokenizer.pad_id
    pairs, rows = load_pairs(run, tokenizer)
    check_any_kept(run, NAME, len(pairs))
    limit = row_limit(training, source.config)
    fitting = [pair for pair in pairs if all(len(tokens) <= limit for tokens, _ in _sides(rows, pair))]
    if not fitting:
        raise InputError(f"dpo.training.max_length: none of {len(pairs)} pairs fits into {limit} tokens")
    # The reward model's seed: what it held out is held out here too.
    train, test = split_pairs(fitting, config.held_out, run.seed("reward/split"), NAME)
    run.say(f"{NAME}: {len(train)} pairs to train on, {len(test)} held out, {len(pairs) - len(fitting)} too long")
    length = fixed_length(max(len(tokens) for pair in fitting for tokens, _ in _sides(rows, pair)))
    ordered = [*train, *test]
    batches_seed, batch_size = run.seed(f"{NAME}/batches"), training.batch_size
    total_steps = count_steps(training, len(train))
    settings, mesh = run.config.mesh, run.mesh
    whole = judging_shape(source.config, settings, mesh)
    # By one kernel on both sides: another one rounds otherwise, and the first margins of unpacked pairs would not be 0.
    shape = dataclasses.replace(training_shape(source.config, settings, mesh), attention=whole.attention)
    score = functools.partial(_response_logprobs, config=whole, length_normalized=config.length_normalized)

    def logprobs(params: Params, chosen: Sequence[Pair]) -> np.ndarray:
        """[n, 2], in batches of `batch_size` pairs, the last one filled up by its own first pair."""
        found = []
        for first in range(0, len(chosen), batch_size):
            part = list(chosen[first : first + batch_size])
            filled = [_sides(rows, pair) for pair in part + part[:1] * (batch_size - len(part))]
            placed = place_batch(pair_batch(filled, length, pad_id), mesh)
            scored = jax.device_put(score(params, placed), replicated(mesh))
            found.append(jax.device_get(scored)[: len(part)])
        return np.concatenate(found) if found else np.zeros((0, 2), np.float32)

    with jax.set_mesh(mesh):
        reference = reference_logprobs(run, ordered, batch_size, lambda part: logprobs(source.params, part))

        def places_at(step: int) -> list[int]:
            return [int(place) for place in batch_indices(step, batch_size, len(train), batches_seed)]

        def sides_at(step: int) -> list[tuple[Example, Example]]:
            return [_sides(rows, train[place]) for place in places_at(step)]

        if config.packed_length:
            split = training.micro_batches * row_parts(mesh)
            packed, spent = packed_rows(
                lambda step: list(itertools.starmap(response_pair, sides_at(step))),
                total_steps, config.packed_length, split, shape.attention != "splash",
            )  # fmt: skip
            say_of_packing(run, NAME, packed, spent, batch_size, length)

        def batch_at(step: int) -> dict[str, np.ndarray]:
            known = np.array([reference[place] for place in places_at(step)], np.float32)
            if config.packed_length:
                return packed_batch(packed, sides_at(step), known, pad_id)
            return {**pair_batch(sides_at(step), length, pad_id), "reference": known}

        def evaluate(params: Params) -> dict[str, float]:
            if not test:
                return {}
            kept = np.array(reference[len(train) :], np.float32)
            total, (count, metrics) = _preferences(jnp.asarray(logprobs(params, test)), jnp.asarray(kept), config)
            figures = {"loss": (total, count), **metrics}
            return {f"held_out_{name}": float(value / number) for name, (value, number) in figures.items()}

        loss_sums = functools.partial(dpo_loss_sums, config=shape, settings=config)
        state = fit(run, NAME, source.params, source.config, loss_sums, batch_at, total_steps, training, evaluate)
        last = evaluate(state.params)
    model = dataclasses.replace(source, params=state.params, name=f"{run.config.name}/{NAME}")
    save_model(run.path(NAME, "model"), model)
    summary = {"pairs": len(train), "held_out": len(test), "too_long": len(pairs) - len(fitting), "steps": total_steps}
    # The share of what the packed steps compute on that is no padding.
    fill = {"fill": spent.tokens / spent.places} if config.packed_length else {}
    return {**summary, **fill, **last}


def load_pairs(run: Run, tokenizer: Tokenizer) -> tuple[list[Pair], dict[str, Example]]:
    """The kept comparisons, and for each of their texts its tokens and which of them are the response's.

    Raises:
        InputError: a comparison's query isn't in queries.jsonl.
    """
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    pairs, rows = [], dict[str, Example]()
    for record in iter_records(run.path("comparisons.jsonl")):
        if not record["kept"]:
            continue
        pair = comparison_pair(queries, record)
        pairs.append(pair)
        for text, response in ((pair.chosen, record["chosen"]["text"]), (pair.rejected, record["rejected"]["text"])):
            if text not in rows:
                asked = queries[record["query_id"]]
                turns: list[Turn] = [{"role": "human", "text": asked}, {"role": "assistant", "text": response}]
                rows[text] = training_tokens(tokenizer, turns)
    return pairs, rows


def reference_logprobs(
    run: Run, pairs: Sequence[Pair], batch_size: int, score: Callable[[Sequence[Pair]], np.ndarray]
) -> References:
    """The reference's log-probs of all pairs, from dpo/reference.jsonl as far as they stand there.

    Args:
        run: whose folder the file is in.
        pairs: n of them, in order.
        batch_size: pairs scored together; a batch that was torn is scored anew as a whole, so that the same program
            gives the same bytes.
        score: some of the pairs -> [n, 2] log-probs.

    Raises:
        InputError: the file is of other pairs.
    """
    path = run.path(NAME, "reference.jsonl")
    names = [f"{place}-{_digest(pair)}" for place, pair in enumerate(pairs)]
    if not from_primary(path.exists):
        with RecordWriter(path, lambda record: str(record["pair"])) as writer:
            with run.progress(f"{NAME}: the reference's log-probs", len(pairs), len(writer.done)) as progress:
                for places in writer.torn_groups(names, batch_size):
                    found = score(pairs[places.start : places.stop])
                    for place, (chosen, rejected) in zip(places, found.tolist(), strict=True):
                        if writer.write_missing({"pair": names[place], "chosen": chosen, "rejected": rejected}):
                            progress.advance()
            writer.finish()
    records = read_records(path)
    if [record["pair"] for record in records] != names:
        raise InputError(f"{path}: holds {len(records)} pairs, not these {len(names)}; delete it, and it is made anew")
    return [(record["chosen"], record["rejected"]) for record in records]


def _digest(pair: Pair) -> str:
    """What tells a pair from another one at the same place."""
    return hashlib.sha256(f"{pair.chosen}\0{pair.rejected}".encode()).hexdigest()[:16]


def pair_batch(pairs: Sequence[tuple[Example, Example]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Pairs as arrays: tokens [B, 2, T] int32 and targets [B, 2, T] bool, the preferred response first."""
    tokens, _ = pad([tokens for pair in pairs for tokens, _ in pair], length, pad_id)
    targets, _ = pad([targets for pair in pairs for _, targets in pair], length, 0)
    shape = (len(pairs), 2, length)
    return {"tokens": tokens.reshape(shape), "targets": targets.reshape(shape).astype(bool)}


def response_pair(chosen: Example, rejected: Example) -> PairTokens:
    """A pair for `PackedRows`: what both begin with is shared but for the token before the first target of either.

    Each text keeps that one, so that all that it has to predict stands behind a token of its own.

    Raises:
        ValueError: a text's first token is a target.
    """
    (chosen_tokens, chosen_targets), (rejected_tokens, rejected_targets) = chosen, rejected
    if chosen_targets[0] or rejected_targets[0]:
        raise ValueError("the first token of a text can't be a target: nothing before it predicts it")
    most = min([*chosen_targets, True].index(True), [*rejected_targets, True].index(True))
    shared = min(shared_size(chosen_tokens, rejected_tokens), most)
    return PairTokens(chosen_tokens, rejected_tokens, max(shared - 1, 0))


def packed_batch(
    packed: PackedRows, pairs: Sequence[tuple[Example, Example]], reference: np.ndarray, pad_id: int
) -> dict[str, np.ndarray]:
    """Pairs packed into rows: what `PackedRows.batch` gives and, by row and place in it, what the loss needs.

    Args:
        packed: the rows.
        pairs: as many as fit, the preferred response first.
        reference: [B, 2] float32, the reference's log-probs.
        pad_id: what fills the rest.

    Returns:
        Besides that targets [R, T] int32, which of the row's texts a token is a target of, counted from 1, chosen
        before rejected, 0 for none; reference [R, P, 2] float32, 0 where there is no pair.
    """
    both = list(itertools.starmap(response_pair, pairs))
    batch = packed.batch(both, pad_id)
    targets = np.zeros(batch["tokens"].shape, np.int32)
    known = np.zeros(batch["ends"].shape, np.float32)
    for row, places in enumerate(packed.places(both)):
        for slot, place in enumerate(places):
            known[row, slot] = reference[place]
            for side, (_, wanted) in enumerate(pairs[place]):
                shared = both[place].shared if packed.share else 0
                own, end = np.array(wanted[shared:]), batch["ends"][row, slot, side] + 1
                targets[row, end - len(own) : end] = np.where(own, 1 + 2 * slot + side, 0)
    return {**batch, "targets": targets, "reference": known}


def packed_logprobs(params: Params, batch: Batch, config: LlamaConfig, length_normalized: bool) -> Array:
    """`response_logprobs` of a batch from `packed_batch`: [R, P, 2] float32, 0 where there is no pair."""
    flat, config = decode_layout(params, config, platform())
    states = packed_states(flat, config, batch)
    found = hidden_figures(flat, config, states, shifted(batch["tokens"]), 1.0, with_entropy=False).logprobs
    rows, pairs = batch["present"].shape
    # Text by text, as there are few of them in a row.
    texts = 1 + jnp.arange(2 * pairs)
    wanted = shifted(batch["targets"])[:, None, :] == texts[None, :, None]
    sums = jnp.sum(jnp.broadcast_to(found[:, None, :], wanted.shape), axis=2, where=wanted)
    if length_normalized:
        sums = sums / jnp.maximum(jnp.sum(wanted, axis=2, dtype=jnp.float32), 1.0)
    return sums.reshape(rows, pairs, 2)


def response_logprobs(params: Params, batch: Batch, config: LlamaConfig, length_normalized: bool) -> Array:
    """Log-prob of each response, its end of text included, given its query.

    Args:
        params: the model's tree.
        batch: tokens and targets, from `pair_batch`.
        config: the model's shape.
        length_normalized: divide by the number of the response's tokens.

    Returns:
        [B, 2] float32, in nats (per token when normalised).
    """
    pairs, _, length = batch["tokens"].shape
    tokens, targets = (batch[name].reshape(2 * pairs, length) for name in ("tokens", "targets"))
    flat, config = decode_layout(params, config, platform())
    states = hidden_states(flat, config, tokens)
    found = hidden_figures(flat, config, states, shifted(tokens), 1.0, with_entropy=False).logprobs
    sums = jnp.sum(found, axis=1, where=shifted(targets))
    if length_normalized:
        sums = sums / jnp.maximum(jnp.sum(targets, axis=1, dtype=jnp.float32), 1.0)
    return sums.reshape(pairs, 2)


_response_logprobs = jax.jit(response_logprobs, static_argnames=("config", "length_normalized"))


def dpo_loss_sums(params: Params, batch: Batch, *, config: LlamaConfig, settings: DpoConfig) -> LossTerms:
    """The preference loss of a batch: `pair_batch` and `reference` [B, 2] float32, or `packed_batch`.

    Returns:
        Sum of losses, number of pairs, metrics.
    """
    if "present" in batch:
        policy = packed_logprobs(params, batch, config, settings.length_normalized)
        return _preferences(policy, batch["reference"], settings, batch["present"])
    policy = response_logprobs(params, batch, config, settings.length_normalized)
    return _preferences(policy, batch["reference"], settings)


def _preferences(policy: Array, reference: Array, settings: DpoConfig, present: Array | None = None) -> LossTerms:
    return preference_sums(policy, reference, settings.beta, settings.label_smoothing, settings.objective, present)


def _sides(rows: dict[str, Example], pair: Pair) -> tuple[Example, Example]:
    return rows[pair.chosen], rows[pair.rejected]
