"""Reward models: where the score is read, normalisation, splits, length-matched accuracy, exact resume."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from almost_jax.config import MeshConfig
from almost_jax.core.heads import add_head
from almost_jax.errors import InputError
from almost_jax.io.models import load_model
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages import as_is_reward, dialogues, pair_figures, reward
from almost_jax.stages.reward import RewardScorer
from almost_jax.stages.templates import Turn


class Stopped(Exception):
    """What a kill looks like from inside."""


def dialogue(query: str, response: str) -> list[Turn]:
    return [{"role": "human", "text": query}, {"role": "assistant", "text": response}]


@pytest.fixture
def scorer(make_run: Callable[..., Run], tmp_path: Path) -> RewardScorer:
    run = make_run(tmp_path)
    source = run.model("small")
    params = add_head(source.params, source.config, jax.random.key(3), stddev=0.4)
    model = dataclasses.replace(source, params=params, kind="reward", reward_mean=0.7, reward_std=1.9)
    return RewardScorer(model, 4, print)


def test_12_input_is_the_dialogue_and_the_end_of_text_where_the_score_is_read(scorer: RewardScorer) -> None:
    tokenizer = scorer.model.tokenizer
    words = "Human: what is red Assistant: a bird"
    expected = [tokenizer.bos_id, *tokenizer.encode(words), tokenizer.eos_id]
    assert dialogues.dialogue_tokens(tokenizer, dialogue("what is red", "a bird")) == expected
    assert dialogues.text_tokens(tokenizer, words) == expected
    alone = scorer.score([dialogue("what is red", "a bird")])
    assert alone.dtype == np.float32 and alone.shape == (1,)
    np.testing.assert_allclose(alone, scorer.score_tokens([expected]), atol=1e-6)


def test_12_batch_mates_and_padding_change_no_score(scorer: RewardScorer) -> None:
    asked = [dialogue("what is red", "a bird " * (1 + 3 * i)) for i in range(7)]
    together = scorer.score(asked)
    alone = np.concatenate([scorer.score([one]) for one in asked])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(scorer.score(asked[::-1]), together[::-1], atol=1e-5)
    assert np.ptp(together) > 0.01


def test_12_an_empty_response_has_a_score_and_no_turn_is_an_error(scorer: RewardScorer) -> None:
    empty = scorer.score([dialogue("what is red", "")])
    tokenizer = scorer.model.tokenizer
    ends = [tokenizer.bos_id, *tokenizer.encode("Human: what is red Assistant:"), tokenizer.eos_id]
    np.testing.assert_allclose(empty, scorer.score_tokens([ends]), atol=1e-6)
    for broken in ([], [{"role": "human", "text": "what is red"}]):
        with pytest.raises(ValueError, match="end with an assistant turn"):
            scorer.score([broken])  # type: ignore[list-item]
    assert scorer.score([]).shape == (0,)


def test_12_a_policy_is_not_a_scorer(make_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a policy"):
        RewardScorer(make_run(tmp_path).model("small"), 4, print)


def test_a_dialogue_longer_than_the_positions_is_scored_by_its_end_and_that_is_said_once(
    scorer: RewardScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(scorer.model.config, max_position_embeddings=16)
    short = RewardScorer(dataclasses.replace(scorer.model, config=config), 4, print)
    asked = [dialogue("what is red", "a bird " * count) for count in (2, 9, 5)]
    rows = [dialogues.dialogue_tokens(scorer.model.tokenizer, one) for one in asked]
    assert [len(row) > 16 for row in rows] == [False, True, True]
    np.testing.assert_allclose(short.score_tokens(rows), scorer.score_tokens([row[-16:] for row in rows]), atol=1e-6)
    short.score_tokens(rows)
    said = f"a dialogue of {len(rows[1])} tokens is longer than the 16 positions of the reward model {short.model.name}"
    assert capsys.readouterr().out.count(said) == 1
    scorer.score_tokens(rows)
    assert capsys.readouterr().out == ""


def test_14_normalised_reference_scores_have_mean_0_and_std_1_also_after_loading(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    summary = reward.run_stage(run)
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    kept = [record for record in read_records(run.path("comparisons.jsonl")) if record["kept"]]
    assert len(kept) == 48
    pairs = [reward.comparison_pair(queries, record) for record in kept]
    train, test = reward.split_pairs(pairs, 8, run.seed("reward/split"), "reward")
    texts = reward.reference_texts(train, 30, run.seed("reward/reference"))
    assert len(texts) == 30
    loaded = reward.load_reward_model(run, "reward")
    assert loaded.score_at_end, "where it was trained to be read"
    assert loaded.kind == "reward"
    scores = RewardScorer(loaded, 8, print).score_tokens(
        [dialogues.text_tokens(loaded.tokenizer, text) for text in texts]
    )
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1.0, abs=1e-4)
    assert loaded.reward_std == summary["reward_std"] != 1.0
    # What the stage reports of held-out pairs is what the saved model says.
    margins = RewardScorer(loaded, 8, print).score_tokens(
        [dialogues.text_tokens(loaded.tokenizer, pair.chosen) for pair in test]
    ) - RewardScorer(loaded, 8, print).score_tokens(
        [dialogues.text_tokens(loaded.tokenizer, pair.rejected) for pair in test]
    )
    assert summary["held_out"] == len(test) == 8
    assert summary["accuracy"] == pytest.approx(float((margins > 0).mean()))
    assert summary["mean_margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert json.loads(run.path("reward", "evaluation.json").read_bytes()) == summary
    # 40 training pairs, batches of 8: one epoch.
    assert summary["steps"] == 5 == read_records(run.path("reward", "metrics.jsonl"))[-1]["step"]


def test_the_head_starts_normal_with_a_variance_of_one_over_the_width(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    small = run.model("small")
    wide = dataclasses.replace(small, config=dataclasses.replace(small.config, hidden_size=9_999))
    first, other = (np.asarray(reward.start_params(wide, seed, run.mesh)["score"]["kernel"]) for seed in (1, 2))
    assert first.size == 9_999 and abs(first.mean()) < 4e-4
    assert first.std() == pytest.approx(0.01, rel=0.03)
    assert (np.abs(first) < 0.01).mean() == pytest.approx(0.683, abs=0.02), "it is normal"
    assert (first != other).any()


def test_14_a_constant_scorer_cannot_be_normalised() -> None:
    with pytest.raises(InputError, match="learned nothing"):
        reward.reward_moments(np.full((5,), 0.25, np.float32))
    assert reward.reward_moments(np.array([1.0, 5.0], np.float32)) == (3.0, 2.0)


def test_training_learns_what_tells_chosen_from_rejected(make_run: Callable[..., Run], tmp_path: Path) -> None:
    training = {
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 16,
        "micro_batches": 2,
        "epochs": 12,
        "checkpoint_every": 100,
        "log_every": 1,
        "max_length": 64,
    }
    run = make_run(tmp_path, reward={"held_out": 8, "reference_samples": 20, "training": training})
    summary = reward.run_stage(run)
    losses = [record["loss"] for record in read_records(run.path("reward", "metrics.jsonl"))]
    assert losses[-1] < 0.4 < losses[0]
    # Chosen responses end with "thanks", rejected ones with "bye": held-out pairs must show it.
    assert summary["accuracy"] > 0.85


@pytest.mark.parametrize("packed_length", [0, 64])
def test_a_steps_loss_has_the_margin_and_the_centering_of_the_config(
    make_run: Callable[..., Run], tmp_path: Path, packed_length: int
) -> None:
    # One pair a step: its loss follows from the figures that are logged.
    training = {"optimizer": {"learning_rate": 3e-3}, "batch_size": 1, "max_length": 64, "log_every": 1}
    section = {"held_out": 8, "reference_samples": 20, "margin": 0.7, "centering": 0.3, "packed_length": packed_length}
    run = make_run(tmp_path, reward={**section, "training": training})
    reward.run_stage(run)
    lines = read_records(run.path("reward", "metrics.jsonl"))
    expected = [
        np.logaddexp(0.0, 0.7 - line["margin"]) + 0.3 * (2 * line["score"]) ** 2 for line in lines
    ]
    assert len(lines) > 20 and [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stop", [1, 3])
def test_28_reward_model_stopped_and_resumed_is_the_same_to_the_byte(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = make_run(tmp_path / "whole")
    reward.run_stage(whole)

    def stopping(step: int, *rest: Any) -> Any:
        if step == stop:
            raise Stopped
        return batch_indices(step, *rest)

    batch_indices = reward.batch_indices
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(reward, "batch_indices", stopping)
        reward.run_stage(make_run(tmp_path / "stopped"))
    resumed = make_run(tmp_path / "stopped")
    reward.run_stage(resumed)
    for name in ("metrics.jsonl", "evaluation.json", "model/model.json"):
        assert whole.path("reward", name).read_bytes() == resumed.path("reward", name).read_bytes()
    ours, theirs = (reward.load_reward_model(run, "reward").params for run in (whole, resumed))
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(left, right)


def test_05_reward_training_is_the_same_on_four_devices(make_run: Callable[..., Run], tmp_path: Path) -> None:
    one, four = make_run(tmp_path / "one"), make_run(tmp_path / "four", mesh=MeshConfig(data=2, fsdp=2), devices=4)
    first, second = reward.run_stage(one), reward.run_stage(four)
    left, right = (read_records(run.path("reward", "metrics.jsonl")) for run in (one, four))
    np.testing.assert_allclose([line["loss"] for line in left], [line["loss"] for line in right], atol=1e-4)
    assert first["accuracy"] == second["accuracy"]


def test_a_querys_pairs_are_all_on_one_side() -> None:
    pairs = [reward.make_pair(f"q{i % 9}", f"what is {i % 9}", f"good {i}", f"bad {i}") for i in range(40)]
    train, test = reward.split_pairs(pairs, 7, 3, "reward")
    groups = [{pair.group for pair in side} for side in (train, test)]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == {f"q{i}" for i in range(9)}
    assert 7 <= len(test) < 7 + 5 and len(train) + len(test) == 40
    # Another query more does not move the others between the sides' order.
    _, more = reward.split_pairs([*pairs, reward.make_pair("new", "x", "a", "b")], 7, 3, "reward")
    assert {pair.group for pair in more} - {"new"} <= groups[1]
    assert reward.split_pairs(pairs, 0, 3, "reward") == (pairs, [])
    with pytest.raises(InputError, match="^reward.held_out: 40 leaves none of 40 pairs"):
        reward.split_pairs(pairs, 40, 3, "reward")


def test_length_matched_accuracy_gives_longer_wins_one_half() -> None:
    generator = np.random.default_rng(4)
    gaps = np.concatenate([generator.integers(1, 300, 80), -generator.integers(1, 300, 23)])
    longer_wins = (gaps > 0).astype(float)
    assert longer_wins.mean() > 0.7
    assert pair_figures.length_matched_accuracy(longer_wins, gaps) == pytest.approx(0.5)
    assert pair_figures.length_matched_accuracy(np.ones(103), gaps) == 1.0
    # By hand: one stratum, longer right 2 of 3, shorter right 1 of 1, one equal pair wrong: (5/3 + 0) / 3.
    gaps = np.array([3, 4, 5, -2, 0])
    hits = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    assert pair_figures.length_matched_accuracy(hits, gaps) == pytest.approx((2 / 3 + 1) / 3)
    assert pair_figures.length_matched_accuracy(np.ones(2), np.array([5, 5])) is None


def test_figures_of_pairs_by_hand() -> None:
    figures = pair_figures.pair_figures(
        np.array([0.3, -0.1, 0.0, 3.0], np.float32), np.array([5, -12, 7, -60]), list("aabc")
    )
    assert figures["held_out"] == 4 and figures["accuracy"] == 0.625
    assert figures["longer_wins_accuracy"] == 0.5
    assert figures["by_margin"] == [
        {"from": 0.0, "to": 0.25, "n": 2, "accuracy": 0.25},
        {"from": 0.25, "to": 0.5, "n": 1, "accuracy": 1.0},
        {"from": 2.0, "to": None, "n": 1, "accuracy": 1.0},
    ]
    assert [(item["from"], item["to"], item["n"]) for item in figures["by_length_gap"]] == [
        (-100, -50, 1),
        (-25, -10, 1),
        (0, 10, 2),
    ]


def test_interval_of_length_matched_accuracy_by_hand() -> None:
    # One stratum: 3 longer (2 right), 1 shorter (right), one of equal length (wrong); weights 1/3, 1, 1; mean 5/9.
    gaps, hits = np.array([3, 4, 5, -2, 0]), np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    mean = (2 / 3 + 1) / 3
    coins = 0.25 * (3 * (1 / 3) ** 2 + 2)
    alone = (2 * (1 / 3) ** 2 * (1 - mean) ** 2) + ((1 / 3) ** 2 + 1) * mean**2 + (1 - mean) ** 2
    # Five groups of one pair each differ by a little more than coins would.
    assert alone > coins
    spread = 1.96 * np.sqrt(alone) / 3
    assert pair_figures.length_matched_interval(hits, gaps, list("abcde")) == pytest.approx(
        [max(mean - spread, 0), min(mean + spread, 1)]
    )
    # Many pairs of few queries: the variance between queries counts, not the number of pairs.
    gaps, hits = np.zeros(400, int), np.repeat([1.0, 0.0, 1.0, 1.0], 100)
    low, high = pair_figures.length_matched_interval(hits, gaps, ["a"] * 100 + ["b"] * 100 + ["c"] * 200)
    wide = 1.96 * np.sqrt(25**2 + 75**2 + 50**2) / 400
    assert (low, high) == pytest.approx((0.75 - wide, 1.0))
    low, high = pair_figures.length_matched_interval(hits, gaps, [str(i) for i in range(400)])
    assert (low, high) == pytest.approx((0.75 - 1.96 * 0.5 / 20, 0.75 + 1.96 * 0.5 / 20))
    assert pair_figures.length_matched_interval(np.ones(2), np.array([5, 5]), ["a", "b"]) is None


def test_a_scorer_of_length_alone_is_called_out_and_a_good_one_is_not() -> None:
    generator = np.random.default_rng(6)
    gaps = np.where(generator.random(600) < 0.8, 1, -1) * generator.integers(1, 200, 600)
    groups = [f"q{i // 5}" for i in range(600)]
    length = pair_figures.pair_figures(gaps / 50 + generator.normal(0, 0.3, 600), gaps, groups)
    assert length["length_only"] and length["length_correlation"] > 0.9 and length["accuracy"] > 0.7
    low, high = length["length_matched_ci95"]
    assert low <= 0.5 <= high
    # Right in most pairs whatever the lengths, and so in line with length where the chosen text is longer.
    good = pair_figures.pair_figures(1.0 + generator.normal(0, 0.7, 600), gaps, groups)
    assert not good["length_only"] and good["length_matched_ci95"][0] > 0.8
    # Length and more: warned of nothing, since it beats chance where length says nothing.
    both = pair_figures.pair_figures(1.0 + gaps / 50 + generator.normal(0, 0.7, 600), gaps, groups)
    assert both["length_correlation"] > 0.5 and not both["length_only"]
    assert pair_figures.learned_length_alone(0.9, None) and not pair_figures.learned_length_alone(0.2, [0.3, 0.6])
    # Which text is called chosen makes no difference.
    flipped = np.where(generator.random(600) < 0.5, 1, -1)
    margins = gaps / 50 + generator.normal(0, 1.0, 600)
    assert pair_figures.length_correlation(margins * flipped, gaps * flipped) == pytest.approx(
        pair_figures.length_correlation(margins, gaps)
    )
    assert pair_figures.length_correlation(np.zeros(4), np.arange(4)) == 0.0
    # Equal values share a rank.
    rounded = np.round(margins)
    expected = spearmanr(np.concatenate([rounded, -rounded]), np.concatenate([gaps, -gaps])).statistic
    assert pair_figures.length_correlation(rounded, gaps) == pytest.approx(expected, rel=1e-12)


def test_all_figures_of_held_out_pairs_are_logged_and_length_alone_is_said(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    comparisons = read_records(run.path("comparisons.jsonl"))
    for place, record in enumerate(comparisons):
        # Longer is better, whatever is said.
        words = ("red", "bird")[place % 2]
        record["chosen"]["text"], record["rejected"]["text"] = " ".join([words] * 9), " ".join([words] * 2)
    write_records(run.path("comparisons.jsonl"), comparisons)
    summary = reward.run_stage(run)
    last = read_records(run.path("reward", "metrics.jsonl"))[-1]
    assert last["held_out_longer_wins_accuracy"] == 1.0 == summary["longer_wins_accuracy"]
    assert {"held_out_accuracy", "held_out_mean_margin", "held_out_length_correlation"} <= set(last)
    assert any(name.startswith("held_out_accuracy/margin_") for name in last)
    assert last["held_out_accuracy/length_gap_25_50"] == summary["accuracy"] == 1.0
    assert last["held_out_length_only"] == 1.0 and summary["length_only"] is True
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("reward: warning: scores follow length") == 1 and "no pair can be matched by length" in said
    assert json.loads(run.path("reward", "evaluation.json").read_bytes())["length_matched_accuracy"] is None


def test_votes_come_from_a_file_with_or_without_prompts(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    shared = "\n\nHuman: what is red\n\nAssistant:"
    write_records(
        path,
        [
            {"prompt": "what is red", "chosen": "a bird", "rejected": "the"},
            {"chosen": f"{shared} a bird", "rejected": f"{shared} a stone"},
        ],
    )
    with_prompt, without = as_is_reward.load_votes(path)
    assert with_prompt.chosen == "Human: what is red\n\nAssistant: a bird" == without.chosen
    assert (with_prompt.chosen_length, with_prompt.rejected_length) == (6, 3)
    assert without.group == "Human: what is red" and without.rejected.endswith("Assistant: a stone")
    assert without.rejected_length - without.chosen_length == len("stone") - len("bird")
    write_records(path, [{"prompt": "what", "chosen": "", "rejected": "the"}])
    with pytest.raises(InputError, match=r"votes.jsonl: record 1: `chosen` must be a text"):
        as_is_reward.load_votes(path)
    # A prompt of null is none; what isn't a text is none either, but by mistake.
    whole = {"chosen": f"{shared} a bird", "rejected": f"{shared} a stone"}
    write_records(path, [{"prompt": None, **whole}])
    assert as_is_reward.load_votes(path) == [without]
    write_records(path, [whole, {"prompt": 3, "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match=r"votes.jsonl: record 2: `prompt` must be a text that is not empty, not 3"):
        as_is_reward.load_votes(path)


@pytest.mark.parametrize(("dropped", "said"), [(["length"] * 3, "none of 3 pairs .length 3."), ([], "none of 0 pairs")])
def test_where_no_pair_was_kept_the_filters_are_named(
    make_run: Callable[..., Run], tmp_path: Path, dropped: list[str], said: str
) -> None:
    run = make_run(tmp_path / "run")
    records = read_records(run.path("comparisons.jsonl"))
    write_records(
        run.path("comparisons.jsonl"),
        [
            {**record, "kept": False, "dropped_by": reason}
            for record, reason in zip(records, dropped, strict=False)
        ],
    )
    with pytest.raises(InputError, match=f"reward: no comparison to train on, the filters kept {said}"):
        reward.run_stage(run)


def test_a_file_without_votes_is_refused(make_run: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text("")
    run = make_run(tmp_path / "run", as_is_reward={"votes": str(path)})
    with pytest.raises(InputError, match=r"as_is_reward.votes: .*votes.jsonl holds no pair"):
        as_is_reward.run_stage(run)


@pytest.mark.parametrize("section", ["reward", "as_is_reward"])
def test_where_no_pair_fits_the_key_is_named(make_run: Callable[..., Run], tmp_path: Path, section: str) -> None:
    votes = {"votes": "microworld", "pairs": 40} if section == "as_is_reward" else {}
    stage = reward.run_stage if section == "reward" else as_is_reward.run_stage
    run = make_run(tmp_path, **{section: {**votes, "training": {"max_length": 4}}})
    with pytest.raises(InputError, match=rf"^{section}\.training\.max_length: none of \d+ pairs fits into 4 tokens"):
        stage(run)


def test_as_is_model_is_trained_on_votes_and_reports_its_own_accuracy(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    votes = tmp_path / "votes.jsonl"
    write_records(
        votes,
        [
            {"prompt": f"what is {'red ' * (i % 5)}", "chosen": "a bird " * (1 + i % 3), "rejected": "the stone"}
            for i in range(60)
        ],
    )
    training = {"optimizer": {"learning_rate": 3e-3}, "batch_size": 8, "checkpoint_every": 2, "log_every": 1}
    section = {"votes": str(votes), "pairs": 40, "held_out": 8, "training": training}
    run = make_run(tmp_path / "run", as_is_reward=section)
    summary = as_is_reward.run_stage(run)
    assert summary["pairs"] + summary["held_out"] == 40 and 0.0 <= summary["accuracy"] <= 1.0
    assert load_model(str(run.path("as_is_reward", "model")), run.mesh, "float32").kind == "reward"


def test_without_held_out_pairs_it_trains_and_says_so_without_warnings(
    make_run: Callable[..., Run], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    training = {"optimizer": {"learning_rate": 3e-3}, "batch_size": 8, "checkpoint_every": 2, "log_every": 1}
    run = make_run(tmp_path, reward={"held_out": 0, "reference_samples": 20, "training": training})
    assert reward.run_stage(run)["held_out"] == 0
    said = [str(warning.message) for warning in recwarn]
    assert not [one for one in said if "Degrees of freedom" in one or "invalid value" in one]
