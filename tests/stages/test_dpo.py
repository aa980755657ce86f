"""DPO: log-probs of the response alone, the reference at step 0, learning, exact resume, off without a section."""

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
from pydantic import ValidationError

from almost_jax.config import DpoConfig, MeshConfig
from almost_jax.core.train import accumulate_gradients
from almost_jax.errors import InputError
from almost_jax.io.models import load_model, save_model
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.stages import dialogues, dpo, reward
from almost_jax.stages.pair_rows import packed_rows
from almost_jax.stages.sft import Example
from almost_jax.stages.training import check_batches

SECTION = {
    "beta": 0.4,
    "held_out": 8,
    "training": {
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 1},
        "batch_size": 8,
        "epochs": 3,
        "max_length": 64,
        "checkpoint_every": 4,
        "log_every": 1,
    },
}


class Stopped(Exception):
    """What a kill looks like from inside."""


@pytest.fixture
def tuned_run(make_run: Callable[..., Run]) -> Callable[..., Run]:
    """A run whose SFT model is there: the vanilla one."""

    def build(folder: Path, **section: Any) -> Run:
        run = make_run(folder, dpo={**SECTION, **section})
        save_model(run.path("sft", "model"), run.model("small"))
        return run

    return build


def test_log_probs_are_those_of_the_response_and_its_end(tuned_run: Callable[..., Run], tmp_path: Path) -> None:
    run = tuned_run(tmp_path)
    model = run.model("small")
    pairs, rows = dpo.load_pairs(run, model.tokenizer)
    records = [record for record in read_records(run.path("comparisons.jsonl")) if record["kept"]]
    assert len(pairs) == len(records) == 48
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    prompts, answers = [], []
    for record in records[:4]:
        prompt = dialogues.prompt_tokens(model.tokenizer, [{"role": "human", "text": queries[record["query_id"]]}])
        for side in ("chosen", "rejected"):
            prompts.append(prompt)
            answers.append([*model.tokenizer.encode(record[side]["text"]), model.tokenizer.eos_id])
    scored = completion_logprobs(
        model.params, model.config, prompts, answers, temperature=1.0, batch_size=4, multiple=8
    )
    # The pad token is a real one: masks come from lengths.
    batch = dpo.pair_batch([(rows[pair.chosen], rows[pair.rejected]) for pair in pairs[:4]], 40, model.tokenizer.eos_id)
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    found = dpo.response_logprobs(model.params, placed, model.config, False)
    np.testing.assert_allclose(found.reshape(-1), [row.sum() for row in scored], rtol=1e-5)
    per_token = dpo.response_logprobs(model.params, placed, model.config, True)
    np.testing.assert_allclose(per_token.reshape(-1), [row.mean() for row in scored], rtol=1e-5)


def ragged_pairs(vocab: int) -> list[tuple[Example, Example]]:
    """Pairs of (tokens both begin with, of which so many last ones are targets already; tokens of either alone)."""
    generator = np.random.default_rng(3)
    pairs = []
    for shared, answered, *sizes in [(6, 0, 3, 5), (1, 0, 4, 2), (9, 3, 1, 6), (12, 1, 2, 2), (4, 0, 7, 1)]:
        begin = generator.integers(3, vocab, shared).tolist()
        sides = []
        for side, size in enumerate(sizes):
            tokens = [*begin, 3 + side, *generator.integers(3, vocab, size - 1).tolist()]
            sides.append((tokens, [place >= shared - answered for place in range(len(tokens))]))
        pairs.append((sides[0], sides[1]))
    return pairs


def test_targets_stand_behind_a_token_of_their_own_text() -> None:
    pairs = ragged_pairs(20)
    # One token less than both begin with, and none from the one before the first target on.
    assert [dpo.response_pair(*pair).shared for pair in pairs] == [5, 0, 5, 10, 3]
    assert dpo.response_pair(([5], [False]), ([5, 6], [False, True])).shared == 0
    with pytest.raises(ValueError, match="first token of a text can't be a target"):
        dpo.response_pair(([5, 6], [False, True]), ([5, 6], [True, True]))


@pytest.mark.parametrize(
    ("share", "micro_batches", "normalized"), [(True, 1, False), (True, 2, True), (False, 2, False)]
)
def test_22_losses_and_gradients_are_equal_packed_and_unpacked(
    tuned_run: Callable[..., Run], tmp_path: Path, share: bool, micro_batches: int, normalized: bool
) -> None:
    model = tuned_run(tmp_path).model("small")
    pairs = ragged_pairs(model.config.vocab_size)
    reference = np.random.default_rng(5).normal(size=(len(pairs), 2)).astype(np.float32) - 6
    both = [dpo.response_pair(*pair) for pair in pairs]
    rows, _ = packed_rows(lambda _: both, 1, 31, 2, share)
    packed = dpo.packed_batch(rows, pairs, reference, model.tokenizer.eos_id)
    unpacked = {**dpo.pair_batch(pairs, 24, model.tokenizer.pad_id), "reference": reference}
    settings = DpoConfig(beta=0.4, length_normalized=normalized)
    loss = functools.partial(dpo.dpo_loss_sums, config=model.config, settings=settings)

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params: Any, batch: Any, parts: int) -> Any:
        return accumulate_gradients(loss, params, batch, parts)

    found, figures = gradients(model.params, packed, micro_batches)
    expected, plain = gradients(model.params, unpacked, 1)
    for name, value in plain.items():
        assert float(figures[name]) == pytest.approx(float(value), abs=1e-5)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_28_packed_it_takes_the_same_steps_and_resumes_to_the_byte(
    tuned_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {**SECTION, "training": {**SECTION["training"], "max_length": 32, "epochs": 1, "micro_batches": 2}}  # type: ignore[dict-item]
    plain = tuned_run(tmp_path / "plain", **section)
    whole, stopped = (tuned_run(tmp_path / name, **section, packed_length=64) for name in ("whole", "stopped"))
    unpacked, packed = dpo.run_stage(plain), dpo.run_stage(whole)
    assert packed["steps"] == unpacked["steps"] == 5
    for ours, theirs in zip(
        read_records(whole.path("dpo", "metrics.jsonl")), read_records(plain.path("dpo", "metrics.jsonl")), strict=True
    ):
        if ours["step"] <= 2:
            # The first step's learning rate is 0: until then policy and reference are one, and rounding alone decides
            # which margins are above 0.
            assert max(abs(ours["margin"]), abs(theirs["margin"])) < 1e-5
            ours["accuracy"] = theirs["accuracy"]
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert "dpo: 8 pairs in 4 rows of 64 tokens a step" in whole.console.file.getvalue()  # type: ignore[attr-defined]
    packed_batch, calls = dpo.packed_batch, list[int]()

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        # Four of the five steps are kept by a checkpoint.
        if len(calls) == 5:
            raise Stopped
        return packed_batch(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(dpo, "packed_batch", stopping)
        dpo.run_stage(stopped)
    dpo.run_stage(stopped)
    for name in ("metrics.jsonl", "reference.jsonl"):
        assert whole.path("dpo", name).read_bytes() == stopped.path("dpo", name).read_bytes()
    ours, theirs = (load_model(str(run.path("dpo", "model")), run.mesh, "float32") for run in (whole, stopped))
    for left, right in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_packed_pairs_are_split_over_devices_that_gather_weights(make_run: Callable[..., Run], tmp_path: Path) -> None:
    training = {**SECTION["training"], "max_length": 32, "epochs": 1, "micro_batches": 3, "batch_size": 12}  # type: ignore[dict-item]
    section = {**SECTION, "training": training, "packed_length": 64}
    one = make_run(tmp_path / "one", dpo=section)
    four = make_run(tmp_path / "four", dpo=section, mesh=MeshConfig(data=2, fsdp=2, explicit=True), devices=4)
    # 12 pairs can't be split into 4 x 3 equal parts, but rows are as many as can.
    check_batches(four.config, four.mesh, ["dpo"])
    for run in (one, four):
        save_model(run.path("sft", "model"), run.model("small"))
        dpo.run_stage(run)
    assert "12 pairs in 12 rows of 64 tokens a step" in four.console.file.getvalue()  # type: ignore[attr-defined]
    left, right = (read_records(run.path("dpo", "metrics.jsonl")) for run in (one, four))
    np.testing.assert_allclose([line["loss"] for line in left], [line["loss"] for line in right], atol=1e-4)


def test_with_splash_attention_every_response_keeps_its_own_query(
    tuned_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[bool] = []

    def stopping(*given: Any) -> Any:
        shared.append(given[-1])
        raise Stopped

    monkeypatch.setattr(dpo, "packed_rows", stopping)
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *_: [])
    run = tuned_run(tmp_path, packed_length=128)
    for kernel in ("splash", "blocks", "plain"):
        shape = functools.partial(dataclasses.replace, attention=kernel)
        monkeypatch.setattr(dpo, "training_shape", lambda config, *_, shape=shape: shape(config))
        monkeypatch.setattr(dpo, "judging_shape", lambda config, *_, shape=shape: shape(config))
        with pytest.raises(Stopped):
            dpo.run_stage(run)
    assert shared == [False, True, True]


def test_before_the_first_update_the_policy_is_the_reference(tuned_run: Callable[..., Run], tmp_path: Path) -> None:
    run = tuned_run(tmp_path)
    summary = dpo.run_stage(run)
    metrics = read_records(run.path("dpo", "metrics.jsonl"))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["margin"] == pytest.approx(0.0, abs=1e-5)
    assert metrics[0]["chosen_reward"] == pytest.approx(0.0, abs=1e-5)
    references = read_records(run.path("dpo", "reference.jsonl"))
    assert [record["pair"].split("-")[0] for record in references] == [str(place) for place in range(48)]
    assert summary["pairs"] + summary["held_out"] == 48 and summary["held_out"] >= 8
    assert summary["steps"] == len(metrics) == 3 * summary["pairs"] // 8
    # It learns its pairs, and unlearns nothing of how a response is scored.
    assert metrics[-1]["loss"] < 0.6 and metrics[-1]["margin"] > 0.1 and metrics[-1]["accuracy"] > 0.6
    assert summary["held_out_loss"] == metrics[-1]["held_out_loss"]
    assert load_model(str(run.path("dpo", "model")), run.mesh, "float32").kind == "policy"


@pytest.mark.parametrize("packed_length", [0, 64])
@pytest.mark.parametrize("objective, smoothing", [("sigmoid", 0.3), ("ipo", 0.0)])
def test_a_steps_loss_is_that_of_the_objective_and_the_smoothing_of_the_config(
    tuned_run: Callable[..., Run], tmp_path: Path, objective: str, smoothing: float, packed_length: int
) -> None:
    # One pair a step: its loss follows from the margin that is logged, beta h.
    training = {**SECTION["training"], "batch_size": 1, "epochs": 1}  # type: ignore[dict-item]
    run = tuned_run(
        tmp_path, objective=objective, label_smoothing=smoothing, training=training, packed_length=packed_length
    )
    dpo.run_stage(run)
    lines = read_records(run.path("dpo", "metrics.jsonl"))
    margins = np.array([line["margin"] for line in lines])
    if objective == "ipo":
        expected = ((margins - 0.5) / SECTION["beta"]) ** 2
    else:
        expected = (1 - smoothing) * np.logaddexp(0.0, -margins) + smoothing * np.logaddexp(0.0, margins)
    assert len(lines) > 20 and np.ptp(margins) > 0.1
    np.testing.assert_allclose([line["loss"] for line in lines], expected, atol=1e-4)


def test_it_learns_from_the_pairs_that_the_reward_model_learned_from(
    tuned_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, split, found = tuned_run(tmp_path), reward.split_pairs, list[Any]()

    def remembering(*arguments: Any) -> Any:
        found.append(split(*arguments))
        return found[-1]

    score, chunks = dpo._response_logprobs, set[int]()

    def watching(*arguments: Any, config: Any, **rest: Any) -> Any:
        chunks.add(config.vocab_chunk)
        return score(*arguments, config=config, **rest)

    monkeypatch.setattr(reward, "split_pairs", remembering)
    monkeypatch.setattr(dpo, "split_pairs", remembering)
    monkeypatch.setattr(dpo, "_response_logprobs", watching)
    reward.run_stage(run)
    dpo.run_stage(run)
    assert found[0] == found[1] and len(found[0][1]) >= 8
    assert chunks == {0}, "on a CPU the head is in one piece where pairs are scored too"


@pytest.mark.parametrize("stop", ["reference", "training"])
def test_28_stopped_and_resumed_is_the_same_to_the_byte(
    tuned_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    whole, stopped = tuned_run(tmp_path / "whole"), tuned_run(tmp_path / "stopped")
    dpo.run_stage(whole)
    place_batch, batch_indices, calls = dpo.place_batch, dpo.batch_indices, list[int]()

    def no_more_references(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return place_batch(*arguments)

    def no_more_steps(step: int, *rest: Any) -> Any:
        if step == 6:
            raise Stopped
        return batch_indices(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        if stop == "reference":
            patch.setattr(dpo, "place_batch", no_more_references)
        else:
            patch.setattr(dpo, "batch_indices", no_more_steps)
        dpo.run_stage(stopped)
    if stop == "reference":
        # A batch of which a part was written is scored anew, as a whole.
        partial = run_partial(stopped)
        lines = partial.read_bytes().splitlines(keepends=True)
        assert len(lines) == 16
        partial.write_bytes(b"".join(lines[:13]) + lines[13][:9])
    dpo.run_stage(stopped)
    for file in ("metrics.jsonl", "reference.jsonl", "model/model.json"):
        assert whole.path("dpo", file).read_bytes() == stopped.path("dpo", file).read_bytes()
    ours, theirs = (load_model(str(run.path("dpo", "model")), run.mesh, "float32") for run in (whole, stopped))
    for left, right in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(left, right)


def run_partial(run: Run) -> Path:
    return run.path("dpo", "reference.jsonl.partial")


def test_without_a_section_it_is_off_and_bad_settings_are_refused(
    make_run: Callable[..., Run], tuned_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "off")
    assert dpo.run_stage(run) == {"dpo": "off"} and not run.path("dpo").exists()
    with pytest.raises(ValidationError, match="leave it at 0 with ipo"):
        DpoConfig(objective="ipo", label_smoothing=0.1)
    short = tuned_run(tmp_path / "short", training={**SECTION["training"], "max_length": 5})
    with pytest.raises(InputError, match="dpo.training.max_length: none of 48 pairs fits into 5 tokens"):
        dpo.run_stage(short)
    nothing = tuned_run(tmp_path / "nothing")
    records = read_records(nothing.path("comparisons.jsonl"))
    write_records(nothing.path("comparisons.jsonl"), [{**record, "kept": False} for record in records])
    with pytest.raises(InputError, match="dpo: no comparison to train on, the filters kept none of 72 pairs"):
        dpo.run_stage(nothing)
    other = tuned_run(tmp_path / "other")
    write_records(other.path("dpo", "reference.jsonl"), [{"pair": "0-0", "chosen": -1.0, "rejected": -2.0}])
    with pytest.raises(InputError, match="holds 1 pairs, not these 48; delete it"):
        dpo.run_stage(other)
    # As many pairs, in another order.
    shuffled = tuned_run(tmp_path / "shuffled")
    dpo.run_stage(shuffled)
    path = shuffled.path("dpo", "reference.jsonl")
    references = read_records(path)
    write_records(path, [*references[1:], references[0]])
    with pytest.raises(InputError, match="holds 48 pairs, not these 48; delete it"):
        dpo.run_stage(shuffled)
