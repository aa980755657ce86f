"""The reward model on all pairs and after each filter: one start, one number of steps, one set of held-out queries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from almost_jax.config import MeshConfig
from almost_jax.errors import InputError
from almost_jax.evaluation import reward_ablation
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages import reward, training
from almost_jax.stages.dialogues import text_tokens

SECTION = {"held_out": 8}


class Stopped(Exception):
    """What a kill looks like from inside."""


@pytest.fixture
def ablated_run(make_run: Callable[..., Run]) -> Callable[..., Run]:
    """A run of whose pairs the length rule has dropped a third, and the as-is reward model an eighth of the rest."""

    def build(folder: Path, **section: Any) -> Run:
        run = make_run(folder, reward_ablation={**SECTION, **section})
        records = read_records(run.path("comparisons.jsonl"))
        for place, record in enumerate(records):
            if record["kept"] and place % 8 == 0:
                record |= {"kept": False, "dropped_by": "as_is_reward"}
        write_records(run.path("comparisons.jsonl"), records)
        return run

    return build


def test_each_set_is_learned_from_and_the_queries_held_out_are_the_same(
    ablated_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fit, seen = ablated_run(tmp_path), reward.fit, dict[str, Any]()

    def watching(run: Run, name: str, params: Any, *rest: Any) -> Any:
        _, _, batch_at, total, *_ = rest
        batch = batch_at(1)
        seen[name] = (np.array(params["score"]["kernel"]), batch["tokens"].copy(), total)
        return fit(run, name, params, *rest)

    monkeypatch.setattr(reward, "fit", watching)
    told = reward_ablation.run_stage(run)
    found = json.loads(run.path("reward_ablation", "ablation.json").read_bytes())
    assert list(seen) == [f"reward_ablation/{name}" for name in ("raw", "heuristic", "as_is")]
    heads, batches, totals = zip(*seen.values(), strict=True)
    assert all((head == heads[0]).all() for head in heads) and len(set(totals)) == 1
    assert not (batches[0].shape == batches[2].shape and (batches[0] == batches[2]).all())
    records = read_records(run.path("comparisons.jsonl"))
    scores = read_records(run.path("reward_ablation", "scores.jsonl"))
    held_out = {record["query_id"] for record in scores}
    sizes = {name: found["models"][name]["pairs"] for name in found["models"]}
    left = [record for record in records if record["query_id"] not in held_out]
    assert sizes == {
        "raw": len(left),
        "heuristic": sum(record["dropped_by"] in (None, "as_is_reward") for record in left),
        "as_is": sum(record["kept"] for record in left),
    }
    assert sizes["raw"] > sizes["heuristic"] > sizes["as_is"]
    assert len(scores) == len(records) - len(left), "every pair of a held-out query is scored, dropped ones too"
    assert 8 <= sum("as_is" in record["sets"] for record in scores) < 8 + 2
    assert found["steps"] == totals[0] == training.count_steps(run.config.reward.training, sizes["as_is"])
    assert set(told) == set(sizes)
    assert told["raw"] == found["held_out"]["as_is"]["accuracy"]["raw"]["mean"]


def test_margins_are_those_of_the_saved_models(ablated_run: Callable[..., Run], tmp_path: Path) -> None:
    run = ablated_run(tmp_path, max_steps=2)
    reward_ablation.run_stage(run)
    assert json.loads(run.path("reward_ablation", "ablation.json").read_bytes())["steps"] == 2
    queries = {record["id"]: record["text"] for record in read_records(run.path("queries.jsonl"))}
    record = read_records(run.path("reward_ablation", "scores.jsonl"))[3]
    pair = reward.make_pair(
        record["query_id"], queries[record["query_id"]], record["chosen"], record["rejected"]
    )
    for name, margin in record["margins"].items():
        model = reward.load_reward_model(run, f"reward_ablation/{name}")
        rows = [text_tokens(model.tokenizer, text) for text in (pair.chosen, pair.rejected)]
        chosen, rejected = reward.RewardScorer(model, 2, print).score_tokens(rows)
        assert margin == pytest.approx(float(chosen - rejected), abs=1e-4)
    assert len({round(margin, 6) for margin in record["margins"].values()}) == 3


def test_a_filter_that_drops_nothing_gives_no_model_of_its_own(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(tmp_path, reward_ablation={**SECTION, "max_steps": 1})
    assert list(reward_ablation.run_stage(run)) == ["raw", "heuristic"]
    assert not run.path("reward_ablation", "as_is").exists()
    off = make_run(tmp_path / "off")
    assert reward_ablation.run_stage(off) == {"reward_ablation": "off"}
    assert not off.path("reward_ablation").exists()


def test_queries_without_a_kept_pair_are_held_out_too_and_too_long_pairs_are_in_no_set(
    ablated_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = ablated_run(tmp_path, max_steps=1)
    records = read_records(run.path("comparisons.jsonl"))
    for place, record in enumerate(records):
        if record["query_id"] in {f"q{i}" for i in range(0, 24, 2)}:
            record |= {"kept": False, "dropped_by": "keyword"}
        if place % 5 == 0:
            record["rejected"]["text"] = "bird " * 70
    write_records(run.path("comparisons.jsonl"), records)
    reward_ablation.run_stage(run)
    scores = read_records(run.path("reward_ablation", "scores.jsonl"))
    found = json.loads(run.path("reward_ablation", "ablation.json").read_bytes())
    sets = [tuple(record["sets"]) for record in scores]
    assert ("raw",) in sets and sets.count(("raw", "heuristic", "as_is")) >= 8
    by_query = {record["query_id"]: set[str]() for record in scores}
    for record in scores:
        by_query[record["query_id"]] |= set(record["sets"])
    assert {"raw"} in by_query.values(), "nothing of one of them was kept"
    assert not any("bird " * 70 in record["rejected"] for record in scores)
    left = [r for r in records if r["query_id"] not in by_query and len(r["rejected"]["text"]) < 300]
    assert found["models"]["raw"]["pairs"] == len(left) < 72 - len(scores)


def test_holding_out_all_pairs_names_the_key(ablated_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reward_ablation.held_out: 99 leaves none of 42 kept pairs that fit"):
        reward_ablation.run_stage(ablated_run(tmp_path, held_out=99))


@pytest.mark.slow
def test_05_the_figures_are_the_same_on_four_devices(
    ablated_run: Callable[..., Run], make_run: Callable[..., Run], tmp_path: Path
) -> None:
    one = ablated_run(tmp_path / "one")
    four = make_run(
        tmp_path / "four", mesh=MeshConfig(data=2, fsdp=2), devices=4, reward_ablation=one.config.reward_ablation
    )
    write_records(four.path("comparisons.jsonl"), read_records(one.path("comparisons.jsonl")))
    reward_ablation.run_stage(one)
    reward_ablation.run_stage(four)
    ours, theirs = (read_records(run.path("reward_ablation", "scores.jsonl")) for run in (one, four))
    for left, right in zip(ours, theirs, strict=True):
        assert left["margins"] == pytest.approx(right["margins"], abs=2e-3)


def test_28_stopped_and_resumed_is_the_same_to_the_byte(
    ablated_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ablated_run(tmp_path / "whole")
    reward_ablation.run_stage(whole)
    stopped, fit = ablated_run(tmp_path / "stopped"), reward.fit

    def stopping(run: Run, name: str, params: Any, config: Any, loss: Any, batch_at: Any, *rest: Any) -> Any:
        def until(place: int) -> dict[str, np.ndarray]:
            if name.endswith("heuristic") and place == 3:
                raise Stopped
            batch: dict[str, np.ndarray] = batch_at(place)
            return batch

        return fit(run, name, params, config, loss, until, *rest)

    monkeypatch.setattr(reward, "fit", stopping)
    with pytest.raises(Stopped):
        reward_ablation.run_stage(stopped)
    monkeypatch.undo()
    reward_ablation.run_stage(stopped)
    for name in ("ablation.json", "scores.jsonl"):
        assert whole.path("reward_ablation", name).read_bytes() == stopped.path("reward_ablation", name).read_bytes()
    for name in ("raw", "heuristic", "as_is"):
        folders = [run.path("reward_ablation", name) for run in (whole, stopped)]
        for file in ("metrics.jsonl", "evaluation.json", "model/model.json"):
            assert folders[0].joinpath(file).read_bytes() == folders[1].joinpath(file).read_bytes()
        ours, theirs = (reward.load_reward_model(run, f"reward_ablation/{name}").params for run in (whole, stopped))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
