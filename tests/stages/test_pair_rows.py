"""Pairs packed into rows: what each text sees, equal losses and gradients, the same training, exact resume."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.core.heads import add_head
from almost_jax.core.llama import hidden_states
from almost_jax.core.train import accumulate_gradients
from almost_jax.errors import InputError
from almost_jax.io.models import Model
from almost_jax.io.records import read_records
from almost_jax.io.run import Run
from almost_jax.stages import as_is_reward, reward
from almost_jax.stages.pair_rows import (
    PackedRows,
    PairTokens,
    TwoTexts,
    packed_rows,
    packed_size,
    pair_batch,
    pair_loss_sums,
    shared_size,
)

# Tokens that both texts begin with, and those of either alone.
RAGGED = [(5, 3, 4), (0, 6, 2), (9, 1, 1), (2, 7, 3), (12, 2, 5), (1, 4, 4)]


class Stopped(Exception):
    """What a kill looks like from inside."""


@pytest.fixture
def small(make_run: Callable[..., Run], tmp_path: Path) -> Model:
    return make_run(tmp_path).model("small")


def ragged_pairs(vocab: int) -> list[TwoTexts]:
    """Pairs that begin alike for as long as `RAGGED` says, and differ in the token behind."""
    generator = np.random.default_rng(8)
    pairs = []
    for shared, *sizes in RAGGED:
        begin = generator.integers(3, vocab, shared).tolist()
        chosen, rejected = (generator.integers(3, vocab, size).tolist() for size in sizes)
        chosen[0], rejected[0] = 3, 4
        pairs.append(([*begin, *chosen], [*begin, *rejected]))
    return pairs


def test_how_much_two_texts_share() -> None:
    assert shared_size([1, 2, 3, 4], [1, 2, 5, 4]) == 2
    # Each keeps its last token, whose score is its own, also where one text goes on from the other or equals it.
    assert shared_size([1, 2], [1, 2, 5]) == 1 and shared_size([1, 2], [1, 2]) == 1
    assert shared_size([7], [7, 8]) == 0 and shared_size([7], [8]) == 0
    pair = PairTokens.scored([1, 2, 3, 4], [1, 2, 5])
    assert packed_size(pair, True) == 5 and packed_size(pair, False) == 7


@pytest.mark.parametrize("share", [True, False])
def test_packed_every_text_sees_itself_and_what_it_begins_with(share: bool) -> None:
    texts = ragged_pairs(20)
    pairs = [PairTokens.scored(*pair) for pair in texts]
    length = 22 if share else 32
    shape, spent = packed_rows(lambda step: pairs[step:], 2, length, 2, share)
    batch = shape.batch(pairs, 0)
    assert shape.rows == (4,) and batch["tokens"].shape == (4, length)
    assert ("seen_ids" in batch) == share
    assert (batch["segment_ids"] > 0).sum() == (71 if share else 100)
    # The second step lacks the first pair.
    assert spent == ((71 + 59) / 2 if share else (100 + 83) / 2, 4 * length)
    found = []
    for row in range(4):
        segments = batch["segment_ids"][row]
        seen = batch["seen_ids"][row] if share else segments
        for ends in batch["ends"][row][batch["present"][row]]:
            seen_texts = []
            for end in ends:
                visible = (np.arange(length) <= end) & ((segments == segments[end]) | (segments == seen[end]))
                np.testing.assert_array_equal(batch["positions"][row][visible], np.arange(visible.sum()))
                seen_texts.append(batch["tokens"][row][visible].tolist())
            found.append(tuple(seen_texts))
    assert sorted(found) == sorted(texts)
    assert batch["present"].sum() == len(pairs) and not batch["ends"][~batch["present"]].any()
    # Whole rows that nothing needs stay empty.
    empty = dataclasses.replace(shape, rows=(2, 6)).batch(pairs, 0)
    assert len(empty["tokens"]) == 6
    assert not empty["segment_ids"][-2:].any() and not empty["present"][-2:].any()


def test_rows_that_are_too_few_or_too_short_are_refused() -> None:
    pairs = [PairTokens.scored(*pair) for pair in ragged_pairs(20)]
    shape, _ = packed_rows(lambda _: pairs, 1, 22, 1, True)
    (rows,) = shape.rows
    with pytest.raises(InputError, match=f"6 pairs need {rows} rows of 22 tokens .* not {rows - 1} of up"):
        dataclasses.replace(shape, rows=(rows - 1,)).batch(pairs, 0)
    with pytest.raises(InputError, match=f"and up to {shape.pairs} pairs, not .* of up to {shape.pairs - 1}"):
        dataclasses.replace(shape, pairs=shape.pairs - 1).batch(pairs, 0)
    with pytest.raises(InputError, match="sequence 4 has 19 tokens, but rows have room for 18"):
        dataclasses.replace(shape, length=18).batch(pairs, 0)
    # Rows are never made too short for the longest pair.
    longer, spent = packed_rows(lambda _: pairs, 1, 5, 1, True)
    assert longer.length == 24 and spent.places == 24 * len(longer.batch(pairs, 0)["tokens"])


@pytest.mark.parametrize(
    ("share", "micro_batches", "attention", "length"),
    [(True, 1, "plain", 22), (True, 2, "blocks", 140), (False, 2, "plain", 32)],
)
def test_22_losses_and_gradients_of_pairs_are_equal_packed_and_unpacked(
    small: Model, share: bool, micro_batches: int, attention: str, length: int
) -> None:
    params = add_head(small.params, small.config, jax.random.key(3), stddev=0.4)
    texts = ragged_pairs(small.config.vocab_size)
    pairs = [PairTokens.scored(*pair) for pair in texts]
    packed = packed_rows(lambda _: pairs, 1, length, 2, share)[0].batch(pairs, small.tokenizer.eos_id)
    unpacked = pair_batch(texts, 24, small.tokenizer.pad_id)
    config = dataclasses.replace(small.config, attention=attention)
    loss = functools.partial(pair_loss_sums, config=config, margin=0.2, centering=0.1)

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params: Any, batch: Any, parts: int) -> Any:
        return accumulate_gradients(loss, params, batch, parts)

    found, figures = gradients(params, packed, micro_batches)
    expected, plain = gradients(params, unpacked, 1)
    assert set(figures) == set(plain)
    for name, value in plain.items():
        assert float(figures[name]) == pytest.approx(float(value), abs=1e-5)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)
    # The test would see a text without its beginning, or with its neighbours.
    blurred = packed | ({"seen_ids": packed["segment_ids"]} if share else {"segment_ids": 0 * packed["segment_ids"]})
    assert abs(float(gradients(params, blurred, 1)[1]["loss"]) - float(plain["loss"])) > 1e-3


def test_splash_attention_is_not_asked_for_what_it_cannot_do(small: Model) -> None:
    splash = dataclasses.replace(small.config, attention="splash")
    rows = jnp.ones((2, 8), jnp.int32)
    with pytest.raises(ValueError, match="splash attention can't let a token see another segment"):
        hidden_states(small.params, splash, rows, positions=rows, segment_ids=rows, seen_ids=rows)
    with pytest.raises(ValueError, match="segment_ids must be given too"):
        hidden_states(small.params, small.config, rows, positions=rows, seen_ids=rows)


def test_with_splash_attention_every_text_keeps_its_own_tokens(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[bool] = []

    def stopping(*given: Any) -> Any:
        shared.append(given[-1])
        raise Stopped

    monkeypatch.setattr(reward, "packed_rows", stopping)
    run = make_run(tmp_path, reward={"packed_length": 128, "held_out": 8, "training": {"max_length": 64}})
    for kernel in ("splash", "blocks", "plain"):
        shape = functools.partial(dataclasses.replace, attention=kernel)
        monkeypatch.setattr(reward, "training_shape", lambda config, *_, shape=shape: shape(config))
        with pytest.raises(Stopped):
            reward.run_stage(run)
    assert shared == [False, True, True]


def test_28_packed_reward_training_takes_the_same_steps_and_resumes_to_the_byte(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"optimizer": {"learning_rate": 3e-3}, "batch_size": 8, "log_every": 1}
    training |= {"checkpoint_every": 2, "max_length": 32}
    section = {"held_out": 8, "reference_samples": 30, "training": training, "packed_length": 80}
    plain = make_run(tmp_path / "plain", reward={**section, "packed_length": 0})
    whole, stopped = (make_run(tmp_path / name, reward=section) for name in ("whole", "stopped"))
    unpacked, packed = reward.run_stage(plain), reward.run_stage(whole)
    assert packed["steps"] == unpacked["steps"] == 5 and packed["accuracy"] == unpacked["accuracy"]
    for ours, theirs in zip(
        read_records(whole.path("reward", "metrics.jsonl")),
        read_records(plain.path("reward", "metrics.jsonl")),
        strict=True,
    ):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    said = whole.console.file.getvalue()  # type: ignore[attr-defined]
    assert "8 pairs in 2 or 3 rows of 80 tokens a step" in said and "warning" not in said
    assert 0.5 < packed["fill"] < 1.0 and "fill" not in unpacked
    make = PackedRows.batch
    calls: list[int] = []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        # Two steps are kept by a checkpoint; those left are of both numbers of rows.
        if len(calls) == 4:
            raise Stopped
        return make(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(PackedRows, "batch", stopping)
        reward.run_stage(stopped)
    reward.run_stage(stopped)
    for name in ("metrics.jsonl", "evaluation.json"):
        assert whole.path("reward", name).read_bytes() == stopped.path("reward", name).read_bytes()
    ours, theirs = (reward.load_reward_model(run, "reward").params for run in (whole, stopped))
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("explicit", [False, True])
def test_05_packed_pairs_are_split_over_devices_that_a_batch_of_them_is_not(
    make_run: Callable[..., Run], tmp_path: Path, explicit: bool
) -> None:
    training = {"batch_size": 6, "max_length": 32, "log_every": 1, "optimizer": {"learning_rate": 3e-3}}
    section = {"votes": "microworld", "pairs": 20, "held_out": 4, "training": training, "packed_length": 64}
    one = make_run(tmp_path / "one", as_is_reward=section)
    four, refused = (
        make_run(
            tmp_path / name,
            mesh=MeshConfig(data=2, fsdp=2, explicit=explicit),
            devices=4,
            as_is_reward={**section, "packed_length": packed_length},
        )
        for name, packed_length in (("four", 64), ("refused", 0))
    )
    with pytest.raises(InputError, match="batch_size: 6 rows can't be split over 4 devices"):
        as_is_reward.run_stage(refused)
    first, second = as_is_reward.run_stage(one), as_is_reward.run_stage(four)
    left, right = (read_records(run.path("as_is_reward", "metrics.jsonl")) for run in (one, four))
    np.testing.assert_allclose([line["loss"] for line in left], [line["loss"] for line in right], atol=1e-4)
    assert first["accuracy"] == second["accuracy"]


def test_packing_that_costs_more_is_said(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"batch_size": 4, "max_length": 32, "epochs": 1}
    section = {"held_out": 8, "reference_samples": 30, "training": training, "packed_length": 640}
    run = make_run(tmp_path, reward=section)

    def stopping(*_: Any) -> Any:
        raise Stopped

    monkeypatch.setattr(reward, "fit", stopping)
    with pytest.raises(Stopped):
        reward.run_stage(run)
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    # Of a row for each text: two texts of four pairs, 24 tokens each.
    assert "reward: warning: that is 640 places, more than the 192 of a row for each text; give shorter rows" in said
