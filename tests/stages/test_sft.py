"""Fine-tuning: which tokens are targets, what the model is asked afterwards, exact resume."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.attention import attention, causal_mask
from almost_jax.core.llama import LlamaConfig, Params, hidden_states, logits
from almost_jax.core.splash import splash_attention
from almost_jax.core.train import accumulate_gradients
from almost_jax.errors import InputError
from almost_jax.io.batches import enough_rows, first_fit, row_counts
from almost_jax.io.models import Model, load_model
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.stages import dialogues, sft
from almost_jax.stages.templates import Turn

TWO_TURNS: list[Turn] = [
    {"role": "human", "text": "what is red"},
    {"role": "assistant", "text": "a bird thanks"},
    {"role": "human", "text": "please one"},
    {"role": "assistant", "text": "the river bye"},
]

loss_sums = jax.jit(sft.sft_loss_sums, static_argnames=("config", "z_loss"))


@functools.partial(jax.jit, static_argnums=1)
def forward(params: Params, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    """The logits of whole rows."""
    return logits(params, config, hidden_states(params, config, tokens))


class Stopped(Exception):
    """What a kill looks like from inside."""


@pytest.fixture
def small(make_run: Callable[..., Run], tmp_path: Path) -> Model:
    return make_run(tmp_path).model("small")


def test_targets_are_the_assistants_words_and_the_end_of_each_of_its_turns(small: Model) -> None:
    tokenizer = small.tokenizer
    tokens, targets = dialogues.training_tokens(tokenizer, TWO_TURNS)
    spelled = [
        (1, False),
        *[(token, False) for token in tokenizer.encode("Human: what is red Assistant:")],
        *[(token, True) for token in [*tokenizer.encode("a bird thanks"), tokenizer.eos_id]],
        *[(token, False) for token in tokenizer.encode("Human: please one Assistant:")],
        *[(token, True) for token in [*tokenizer.encode("the river bye"), tokenizer.eos_id]],
    ]
    assert list(zip(tokens, targets, strict=True)) == spelled
    with pytest.raises(ValueError, match="end with an assistant turn"):
        dialogues.training_tokens(tokenizer, TWO_TURNS[:3])


def test_what_a_fine_tuned_model_is_asked_is_what_it_was_trained_on(small: Model) -> None:
    tokens, targets = dialogues.training_tokens(small.tokenizer, TWO_TURNS)
    for turns in (1, 3):
        prompt = dialogues.prompt_tokens(small.tokenizer, TWO_TURNS[:turns])
        assert tokens[: len(prompt)] == prompt
        assert targets[len(prompt)] and not targets[len(prompt) - 1]


def test_an_empty_response_is_trained_to_end_at_once(small: Model) -> None:
    turns: list[Turn] = [{"role": "human", "text": "one"}, {"role": "assistant", "text": ""}]
    tokens, targets = dialogues.training_tokens(small.tokenizer, turns)
    assert tokens[-1] == small.tokenizer.eos_id and targets == [False] * (len(tokens) - 1) + [True]


def test_loss_is_the_mean_over_targets_of_ragged_examples(small: Model) -> None:
    examples = [dialogues.training_tokens(small.tokenizer, TWO_TURNS[:size]) for size in (2, 4)]
    batch = sft.example_batch(examples, 32, small.tokenizer.pad_id)
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    total, (targets, _) = loss_sums(small.params, placed, config=small.config, z_loss=0.0)
    expected, count = 0.0, 0
    for tokens, wanted in examples:
        scores = forward(small.params, small.config, jnp.asarray([tokens]))
        logprobs = np.asarray(jax.nn.log_softmax(scores, axis=-1))[0]
        for place, target in enumerate(wanted):
            if target:
                expected -= float(logprobs[place - 1, tokens[place]])
                count += 1
    assert int(targets) == count == 4 + 8
    assert float(total) == pytest.approx(expected, rel=1e-5)
    # Padding is masked by length, also where the pad token is a real one.
    other = sft.example_batch(examples, 48, small.tokenizer.eos_id)
    again, (same, _) = loss_sums(
        small.params, {name: jnp.asarray(array) for name, array in other.items()}, config=small.config, z_loss=0.0
    )
    assert int(same) == count and float(again) == pytest.approx(expected, rel=1e-5)


RAGGED = [(7, 3), (12, 1), (5, 2), (16, 9), (3, 1), (9, 4)]


def ragged_examples(vocab: int) -> list[sft.Example]:
    """Examples of odd lengths, the last tokens of each being targets."""
    generator = np.random.default_rng(5)
    return [
        (generator.integers(1, vocab, size).tolist(), [place >= size - wanted for place in range(size)])
        for size, wanted in RAGGED
    ]


def test_batches_are_of_one_number_of_rows_or_two() -> None:
    assert row_counts([5], 1) == (5,) and row_counts([5, 5, 7], 4) == (8,)
    # 9 x 3 + 7 rows instead of 70; 3 x 2 + 7 x 8 rather than 4 x 4 + 6 x 8; 9 x 18 + 20 saves less than a tenth.
    assert row_counts([3, 3, 2, 3, 7, 3, 1, 3, 3, 3], 1) == (3, 7)
    assert row_counts([2, 3, 2, 7, 1, 7, 7, 7, 7, 7], 2) == (2, 8)
    assert row_counts([18] * 9 + [20], 1) == (20,)
    assert [enough_rows((3, 7), rows) for rows in (1, 3, 4, 7)] == [3, 3, 7, 7]


def test_packing_keeps_examples_whole_and_apart() -> None:
    assert first_fit([7, 12, 5, 16, 3, 9], 17) == [[3], [1, 2], [5, 0], [4]]
    assert first_fit([4, 4, 4], 8) == [[0, 1], [2]] and first_fit([], 3) == []
    with pytest.raises(InputError, match="sequence 1 has 9 tokens, but rows have room for 8"):
        first_fit([3, 9], 8)
    examples = ragged_examples(20)
    batch = sft.packed_batch(examples, 5, 17, 0)
    found = []
    for row in range(5):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(here.sum()))
            found.append((batch["tokens"][row][here].tolist(), batch["targets"][row][here].tolist()))
    assert sorted(found) == sorted((list(tokens), list(targets)) for tokens, targets in examples)
    assert not batch["targets"][batch["segment_ids"] == 0].any() and not batch["segment_ids"][4].any()
    with pytest.raises(InputError, match="6 demonstrations need 4 rows of 17 tokens, not 3"):
        sft.packed_batch(examples, 3, 17, 0)
    with pytest.raises(ValueError, match="first token of example 0 can't be a target"):
        sft.packed_batch([([3, 4], [True, True])], 1, 4, 0)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_22_losses_and_gradients_are_equal_packed_and_unpacked(small: Model, micro_batches: int) -> None:
    examples = ragged_examples(small.config.vocab_size)
    packed = sft.packed_batch(examples, 4, 19, small.tokenizer.eos_id)
    unpacked = sft.example_batch(examples, 16, small.tokenizer.pad_id)
    loss = functools.partial(sft.sft_loss_sums, config=small.config, z_loss=0.3)

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params: Any, batch: Any, parts: int) -> Any:
        return accumulate_gradients(loss, params, batch, parts)

    found, figures = gradients(small.params, packed, micro_batches)
    expected, plain = gradients(small.params, unpacked, 1)
    for name in ("loss", "accuracy", "z_squared"):
        assert float(figures[name]) == pytest.approx(float(plain[name]), abs=1e-5)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    # The test would see neighbours: without segments the loss is another.
    blurred = {name: array for name, array in packed.items() if name != "segment_ids"}
    assert abs(float(gradients(small.params, blurred, 1)[1]["loss"]) - float(plain["loss"])) > 1e-3


def test_packed_rows_are_equal_under_splash_attentions_kernel() -> None:
    """The kernel's own segment ids hold examples apart, as the plain mask does."""
    batch = sft.packed_batch([([1] * size, [False] * size) for size in (50, 70, 90, 30)], 2, 128, 0)
    generator = np.random.default_rng(2)
    q, k, v = (jnp.asarray(generator.normal(size=(2, 128, heads, 64)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(batch["segment_ids"])
    mask = causal_mask(jnp.asarray(batch["positions"]), segments)
    plain = attention(q, jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2), mask)
    real = batch["segment_ids"] > 0
    found = splash_attention(q, k, v, segments, interpret=True)
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(plain)[real], atol=1e-5)


def test_z_loss_by_hand(small: Model) -> None:
    examples = [dialogues.training_tokens(small.tokenizer, TWO_TURNS)]
    batch = {name: jnp.asarray(array) for name, array in sft.example_batch(examples, 24, 0).items()}
    plain, (number, _) = loss_sums(small.params, batch, config=small.config, z_loss=0.0)
    total, (_, metrics) = loss_sums(small.params, batch, config=small.config, z_loss=0.5)
    scores = np.asarray(forward(small.params, small.config, batch["tokens"]), np.float64)[0]
    where = np.flatnonzero(batch["targets"][0]) - 1
    squares = np.square(np.log(np.exp(scores[where]).sum(axis=-1))).sum()
    assert float(total - plain) == pytest.approx(0.5 * squares, rel=1e-5)
    assert float(metrics["z_squared"][0]) == pytest.approx(squares, rel=1e-5)
    assert int(metrics["z_squared"][1]) == int(number) == len(where)


def test_28_packed_fine_tuning_takes_the_same_steps_and_resumes_to_the_byte(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"optimizer": {"learning_rate": 3e-3}, "epochs": 3, "batch_size": 24, "log_every": 1}
    training |= {"checkpoint_every": 2, "max_length": 32, "micro_batches": 2}
    section = {"training": training, "packed_length": 48, "z_loss": 1e-4}
    plain = make_run(tmp_path / "plain", sft={**section, "packed_length": 0})
    whole, stopped = (make_run(tmp_path / name, sft=section) for name in ("whole", "stopped"))
    unpacked = sft.fine_tune(plain, "sft", "demonstrations.jsonl")
    packed = sft.fine_tune(whole, "sft", "demonstrations.jsonl")
    assert packed["steps"] == unpacked["steps"] == 3 and packed["fill"] > 1.15 * unpacked["fill"]
    for ours, theirs in zip(
        read_records(whole.path("sft", "metrics.jsonl")), read_records(plain.path("sft", "metrics.jsonl")), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)
    packed_batch = sft.packed_batch
    calls: list[int] = []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return packed_batch(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(sft, "packed_batch", stopping)
        sft.fine_tune(stopped, "sft", "demonstrations.jsonl")
    sft.fine_tune(stopped, "sft", "demonstrations.jsonl")
    assert whole.path("sft", "metrics.jsonl").read_bytes() == stopped.path("sft", "metrics.jsonl").read_bytes()
    ours, theirs = (load_model(str(run.path("sft", "model")), run.mesh, "float32") for run in (whole, stopped))
    for left, right in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_packed_rows_are_split_over_slices_too(make_run: Callable[..., Run], tmp_path: Path) -> None:
    training = {"batch_size": 4, "max_length": 32, "log_every": 1}
    run = make_run(
        tmp_path, mesh=MeshConfig(data=2, dcn_data=2), devices=4, sft={"training": training, "packed_length": 48}
    )
    assert sft.fine_tune(run, "sft", "demonstrations.jsonl")["steps"] == 6
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 demonstrations in 4 rows of 48 tokens a step" in said


def test_human_tokens_get_no_gradient_as_targets(small: Model) -> None:
    """Changing what the human says last changes the loss only through what the assistant says after it."""
    tokens, targets = dialogues.training_tokens(small.tokenizer, TWO_TURNS[:2])
    batch = sft.example_batch([(tokens, targets)], 16, 0)
    config = dataclasses.replace(small.config, tie_embeddings=False)

    def loss(head: jax.Array) -> jax.Array:
        params = {**small.params, "lm_head": {"kernel": head}}
        placed = {name: jnp.asarray(array) for name, array in batch.items()}
        # A word's own logit matters at targets alone.
        return loss_sums(params, placed, config=config, z_loss=0.0)[0]

    gradient = jax.grad(loss)(small.params["lm_head"]["kernel"])
    red = small.tokenizer.encode("red")[0]
    bird = small.tokenizer.encode("bird")[0]
    probability = gradient.shape
    assert probability == (16, small.config.vocab_size)
    states = hidden_states(small.params, small.config, jnp.asarray(batch["tokens"]))[0]
    soft = jax.nn.softmax(logits(small.params, small.config, states[None]), axis=-1)[0]
    where = np.flatnonzero(batch["targets"][0]) - 1
    for word, is_target in ((red, 0.0), (bird, 1.0)):
        expected = sum(
            (float(soft[place, word]) - is_target * (batch["tokens"][0, place + 1] == word)) * np.asarray(states[place])
            for place in where
        )
        np.testing.assert_allclose(gradient[:, word], expected, atol=1e-5)


def test_fine_tuning_makes_demonstrated_responses_likely(make_run: Callable[..., Run], tmp_path: Path) -> None:
    training = {
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 8,
        "epochs": 12,
        "checkpoint_every": 100,
        "log_every": 1,
        "max_length": 64,
    }
    run = make_run(tmp_path, sft={"training": training})
    summary = sft.fine_tune(run, "sft", "demonstrations.jsonl")
    assert summary["steps"] == 36 and summary["demonstrations"] == 24
    source, tuned = run.model("small"), load_model(str(run.path("sft", "model")), run.mesh, "float32")
    records = read_records(run.path("demonstrations.jsonl"))
    prompts = [dialogues.prompt_tokens(tuned.tokenizer, record["turns"][:1]) for record in records]
    answers = [
        [*tuned.tokenizer.encode(record["turns"][1]["text"]), tuned.tokenizer.eos_id] for record in records
    ]

    def mean(model: Model) -> float:
        scored = completion_logprobs(
            model.params, model.config, prompts, answers, temperature=1.0, batch_size=8, multiple=16
        )
        return float(np.mean(np.concatenate(scored)))

    assert mean(tuned) > mean(source) + 1.0
    losses = [record["loss"] for record in read_records(run.path("sft", "metrics.jsonl"))]
    assert losses[-1] < 0.6 * losses[0] and math.isfinite(losses[-1])


@pytest.mark.parametrize("devices", [1, 4])
def test_held_out_demonstrations_are_not_learned_from_and_their_loss_is_logged(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    training = {"optimizer": {"learning_rate": 3e-3}, "batch_size": 4, "max_length": 64, "checkpoint_every": 2}
    batches, example_batch = list[list[Any]](), sft.example_batch

    def watching(examples: Any, *rest: Any) -> Any:
        batches.append([tuple(tokens) for tokens, targets in examples if any(targets)])
        return example_batch(examples, *rest)

    monkeypatch.setattr(sft, "example_batch", watching)
    mesh = MeshConfig(data=2, fsdp=2, explicit=True) if devices == 4 else None
    run = make_run(tmp_path, mesh=mesh, devices=devices, sft={"training": training, "held_out": 5, "z_loss": 0.1})
    summary = sft.fine_tune(run, "sft", "demonstrations.jsonl")
    assert summary["demonstrations"] == 19 and summary["held_out"] == 5 and summary["steps"] == 4
    # Whenever a checkpoint is saved, and at the end, the held-out ones come as a batch of four and one of one.
    places = [place for place, batch in enumerate(batches) if len(batch) == 1]
    held_out = {row for place in places for row in batches[place - 1] + batches[place]}
    learned = {row for place, batch in enumerate(batches) if not {place, place + 1} & set(places) for row in batch}
    assert len(places) == 3 and len(held_out) == 5 and len(learned) == 16 and not held_out & learned
    lines = read_records(run.path("sft", "metrics.jsonl"))
    assert [("held_out_loss" in line, line["step"]) for line in lines] == [(True, 2), (True, 4)]
    tuned = load_model(str(run.path("sft", "model")), run.mesh, "float32")
    records = read_records(run.path("demonstrations.jsonl"))
    every = {tuple(row[0]): row[1] for row in (
        dialogues.training_tokens(tuned.tokenizer, sft.demonstration_turns(record)) for record in records
    )}  # fmt: skip
    # The loss of the held-out ones, target by target, under the model that was saved; without the z-loss.
    logprobs = []
    for row in held_out:
        found = jax.nn.log_softmax(forward(tuned.params, tuned.config, jnp.array([row]))[0])
        logprobs += [float(found[place - 1, row[place]]) for place, wanted in enumerate(every[row]) if wanted]
    assert summary["held_out_loss"] == pytest.approx(-np.mean(logprobs), abs=1e-4)
    assert lines[-1]["held_out_loss"] == pytest.approx(summary["held_out_loss"], abs=1e-6)
    assert 0 <= lines[-1]["held_out_accuracy"] <= 1


def test_held_out_demonstrations_are_judged_on_any_mesh_where_rows_are_packed(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """Six demonstrations a step, packed, are a number of rows that four devices can split; six rows aren't."""
    training = {"batch_size": 6, "max_length": 64, "checkpoint_every": 2}
    losses = []
    for devices in (1, 4):
        run = make_run(
            tmp_path / str(devices), mesh=MeshConfig(fsdp=devices), devices=devices,
            sft={"training": training, "held_out": 7, "packed_length": 64},
        )  # fmt: skip
        losses.append(sft.fine_tune(run, "sft", "demonstrations.jsonl")["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_both_models_hold_out_the_demonstrations_of_the_same_queries(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"batch_size": 4, "max_length": 64}
    run = make_run(tmp_path, sft={"training": training, "held_out": 5})
    records = read_records(run.path("demonstrations.jsonl"))
    held_out: list[set[str]] = []
    tokens_of = {
        tuple(dialogues.training_tokens(run.model("small").tokenizer, sft.demonstration_turns(one))[0]): one["query_id"]
        for one in records
    }

    def watching(examples: Any, *rest: Any) -> Any:
        held_out[-1] |= {tokens_of[tuple(tokens)] for tokens, targets in examples if any(targets)}
        return example_batch(examples, *rest)

    example_batch = sft.example_batch
    monkeypatch.setattr(sft, "example_batch", watching)
    monkeypatch.setattr(sft, "fit", lambda run, name, params, *rest: evaluated(rest[-1], params))

    def evaluated(evaluate: Any, params: Any) -> Any:
        evaluate(params)
        raise KeyboardInterrupt

    # All demonstrations, and all but two: by their number alone the order would be another one.
    for kept in (records, records[2:]):
        held_out.append(set())
        write_records(run.path("demonstrations.jsonl"), kept)
        with pytest.raises(KeyboardInterrupt):
            sft.fine_tune(run, "sft", "demonstrations.jsonl")
    assert [len(found) for found in held_out] == [5, 5] and len(held_out[0] & held_out[1]) >= 3


def test_dialogues_without_an_answer_are_nothing_to_learn_from(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path)
    records = read_records(run.path("demonstrations.jsonl"))
    write_records(run.path("demonstrations.jsonl"), [{**one, "turns": one["turns"][:1]} for one in records])
    with pytest.raises(InputError, match=r"demonstrations.jsonl: none of 24 dialogues ends with an answer"):
        sft.fine_tune(run, "sft", "demonstrations.jsonl")


def test_too_many_held_out_demonstrations_are_refused(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path, sft={"held_out": 24})
    with pytest.raises(InputError, match="^sft.held_out: 24 leaves none of 24 demonstrations; hold out fewer"):
        sft.fine_tune(run, "sft", "demonstrations.jsonl")


def test_a_steps_loss_has_the_z_loss_of_the_config(make_run: Callable[..., Run], tmp_path: Path) -> None:
    training = {"batch_size": 8, "max_length": 64, "log_every": 1}
    lines = []
    for z_loss in (0.0, 0.25):
        run = make_run(tmp_path / str(z_loss), sft={"training": training, "z_loss": z_loss})
        sft.fine_tune(run, "sft", "demonstrations.jsonl")
        lines.append(read_records(run.path("sft", "metrics.jsonl"))[0])
    plain, with_z = lines
    assert with_z["z_squared"] > 0.1 and "z_squared" not in plain
    assert with_z["loss"] == pytest.approx(plain["loss"] + 0.25 * with_z["z_squared"], rel=1e-6)


def test_too_long_and_unanswered_demonstrations_are_left_out(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path)
    records = read_records(run.path("demonstrations.jsonl"))
    long = {"query_id": "long", "turns": [*records[0]["turns"][:1], {"role": "assistant", "text": "red " * 80}]}
    mute = {"query_id": "mute", "turns": records[0]["turns"][:1]}
    write_records(run.path("demonstrations.jsonl"), [*records, long, mute])
    summary = sft.fine_tune(run, "sft", "demonstrations.jsonl")
    assert (summary["demonstrations"], summary["too_long"]) == (24, 1)
    write_records(run.path("demonstrations.jsonl"), [long])
    with pytest.raises(InputError, match="none of 1 demonstrations fits into 64 tokens"):
        sft.fine_tune(run, "sft", "demonstrations.jsonl")


@pytest.mark.parametrize("stop", [1, 2])
def test_28_fine_tuning_stopped_and_resumed_is_the_same_to_the_byte(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = make_run(tmp_path / "whole")
    sft.run_stage(whole)
    batch_indices = sft.batch_indices

    def stopping(step: int, *rest: Any) -> Any:
        if step == stop:
            raise Stopped
        return batch_indices(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(sft, "batch_indices", stopping)
        sft.run_stage(make_run(tmp_path / "stopped"))
    resumed = make_run(tmp_path / "stopped")
    assert sft.run_stage(resumed)["sft"]["steps"] == 3
    for name in ("sft", "sft_self_play"):
        for file in ("metrics.jsonl", "model/model.json"):
            assert whole.path(name, file).read_bytes() == resumed.path(name, file).read_bytes()
        ours, theirs = (load_model(str(run.path(name, "model")), run.mesh, "float32") for run in (whole, resumed))
        for left, right in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
            np.testing.assert_array_equal(left, right)


def test_rows_beyond_the_models_positions_are_too_long_and_a_long_warm_up_is_said_aloud(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    training = {"optimizer": {"warmup_steps": 3}, "batch_size": 8, "max_length": 1024, "log_every": 1}
    run = make_run(tmp_path, sft={"training": training})
    records = read_records(run.path("demonstrations.jsonl"))
    long: list[Turn] = [{"role": "human", "text": "what is"}, {"role": "assistant", "text": "red " * 150}]
    write_records(run.path("demonstrations.jsonl"), [*records, {"query_id": "long", "turns": long}])
    assert run.model("small").config.max_position_embeddings == 128
    assert sft.fine_tune(run, "sft", "demonstrations.jsonl")["steps"] == 3
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"sft: {len(records)} demonstrations, 1 too long" in said
    assert "sft: warmup_steps 3 for 3 updates: the learning rate ends below 1e-05" in said
