"""The evaluation stage on tiny random models: what it writes, where it stops, and how it goes on."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from almost_jax.errors import InputError
from almost_jax.evaluation.stage import run_stage
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.microworld.gold import gold_score, kind
from almost_jax.report import tables


def test_gold_json_holds_every_figure_over_every_query(finished: Path) -> None:
    figures = json.loads((finished / "evaluation" / "gold.json").read_text())
    for name in ("A", "B"):
        assert figures["configurations"][name]["n"] == 18
    assert list(figures["policies"]) == ["prompted", "sft_self_play", "sft", "rlsf"]
    assert all(set(figure) == {"mean", "ci95", "n"} and figure["n"] == 18 for figure in figures["policies"].values())
    assert set(figures["pairs"]) == {"raw", "heuristic", "as_is"}
    assert set(figures["best_of_n"]) == {"1", "3", "oracle_3"}
    assert [point["step"] for point in figures["rlsf_curve"]] == [0, 2]
    assert all(point["n"] == 7 for point in figures["rlsf_curve"])
    assert [point["step"] for point in figures["over_optimised_curve"]] == [1]
    assert list(figures["selected"]) == ["rlsf", "over_optimisation"]
    for score, step in figures["selected"]["rlsf"].items():
        means = {point["step"]: point[score] for point in figures["rlsf_curve"]}
        assert means[step] == max(means.values())
    assert set(figures["selected"]["rlsf"]) == {"reward", "as_is", "gold"}
    assert figures["contamination"] == dict.fromkeys(figures["contamination"], 0)


def test_rlsf_stands_beside_dpo_and_the_best_of_n_of_the_sft_policy(finished: Path) -> None:
    figures = json.loads((finished / "evaluation" / "gold.json").read_text())
    assert list(figures["rivals"]) == ["sft", "dpo", "sft_best_of_n", "rlsf"]
    gains = ["dpo - sft", "sft_best_of_n - sft", "rlsf - sft", "rlsf - dpo", "rlsf - sft_best_of_n"]
    assert list(figures["rival_gains"]) == gains
    for name in ("sft", "rlsf"):
        assert figures["rivals"][name]["mean"] == figures["policies"][name]["mean"]
    items = read_records(finished / "evaluation" / "items.jsonl")
    expected = []
    for query in dict.fromkeys(item["query_id"] for item in items):
        group = [item for item in items if item["system"] == "policy/sft_best_of_n" and item["query_id"] == query]
        expected.append(sorted(group, key=lambda item: (-item["reward"], item["text"]))[0]["gold"])
    assert figures["rivals"]["sft_best_of_n"]["mean"] == pytest.approx(sum(expected) / 18)
    assert "policy/dpo" in figures["by_kind"] and "policy/sft_best_of_n" not in figures["by_kind"]
    claims = [claim.text for claim in tables.claims(figures)]
    assert {"DPO beats SFT on guided self-play", "RLSF beats DPO"} <= set(claims)
    table = tables.rivals_table(figures)
    assert [row[0] for row in table.rows][1:3] == ["DPO on the same pairs", "SFT, reward model's choice of N samples"]
    assert all(len(row) == len(table.header) for row in table.rows) and table.rows[0][3:7] == ("–",) * 4


def test_16_policy_that_is_the_reference_has_kl_0(finished: Path) -> None:
    curve = json.loads((finished / "evaluation" / "gold.json").read_text())["rlsf_curve"]
    assert curve[0]["kl"] == 0
    assert abs(curve[1]["kl"]) > 0.1


def test_items_keep_everything_and_carry_their_gold_score(finished: Path) -> None:
    items = read_records(finished / "evaluation" / "items.jsonl")
    systems = ["configuration/A", "configuration/B", "best_of_n"]
    systems += [f"policy/{name}" for name in ("prompted", "sft_self_play", "sft", "rlsf", "dpo")]
    expected = {system: 18 for system in systems} | {"best_of_n": 18 * 3, "curve/0": 7, "curve/2": 7}
    expected |= {"over_optimised/1": 7}
    expected |= {"policy/sft_best_of_n": 18 * 3}
    assert {system: sum(item["system"] == system for item in items) for system in expected} == expected
    assert len(items) == sum(expected.values())
    for item in items:
        assert item["gold"] == gold_score(item["query"], item["text"])
        assert item["kind"] == kind(item["query"])
        along_ppo = item["system"].startswith(("curve/", "over_optimised/"))
        assert (item["kl"] is None) == (not along_ppo)
        assert (item["as_is"] is None) == (not along_ppo and not item["system"].startswith("configuration/"))
    held_out = read_records(finished / "evaluation_queries.jsonl")
    assert {item["query"] for item in items} == {query["text"] for query in held_out}


def test_10_samples_of_best_of_n_and_of_equal_systems_differ(finished: Path) -> None:
    items = read_records(finished / "evaluation" / "items.jsonl")
    by_sample = [
        [item["text"] for item in items if (item["system"], item["sample"]) == ("best_of_n", n)] for n in (0, 1, 2)
    ]
    assert by_sample[0] != by_sample[1] != by_sample[2] != by_sample[0]
    # The same model, prompt and rules, but another system: it draws for itself.
    assert by_sample[0] != [item["text"] for item in items if item["system"] == "configuration/A"]


@pytest.mark.parametrize("written", [5, 40, 127])
def test_28_an_interrupted_evaluation_ends_with_the_same_bytes(
    finished: Path, home: Path, tmp_path: Path, written: int, make_run: Callable[..., Run]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = (folder / "evaluation" / "items.jsonl").read_bytes()
    figures = (folder / "evaluation" / "gold.json").read_bytes()
    shutil.rmtree(folder / "evaluation")
    (folder / "evaluation").mkdir()
    lines = whole.splitlines(keepends=True)
    torn = b"".join(lines[:written]) + lines[written][:20]
    (folder / "evaluation" / "items.jsonl.partial").write_bytes(torn)
    run_stage(make_run(folder, home))
    assert (folder / "evaluation" / "items.jsonl").read_bytes() == whole
    assert (folder / "evaluation" / "gold.json").read_bytes() == figures
    assert not (folder / "evaluation" / "items.jsonl.partial").exists()


def test_finished_items_are_not_sampled_again(
    finished: Path, home: Path, tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "reward")  # without which nothing could be scored
    (folder / "evaluation" / "gold.json").unlink()
    run_stage(make_run(folder, home))
    name = Path("evaluation", "gold.json")
    assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_missing_model_is_named(
    finished: Path, home: Path, tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "evaluation")
    shutil.rmtree(folder / "sft_self_play")
    with pytest.raises(InputError, match="sft_self_play/model: no such model"):
        run_stage(make_run(folder, home))


def test_held_out_queries_that_were_trained_on_are_counted_and_said(
    finished: Path, home: Path, tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    query = read_records(folder / "evaluation_queries.jsonl")[3]["text"]
    turns = [{"role": "human", "text": f" {query.replace(' ', '  ')}"}, {"role": "assistant", "text": "sure ."}]
    write_records(folder / "demonstrations.jsonl", [{"query_id": "q0", "turns": turns}])
    run = make_run(folder, home)
    run_stage(run)
    found = json.loads((folder / "evaluation" / "gold.json").read_text())["contamination"]
    assert found == {"queries": 0, "demonstrations, self_play": 0, "demonstrations, reward_guided": 1}
    assert isinstance(run.console.file, io.StringIO)
    assert "1 held-out queries also stand in demonstrations, reward_guided" in run.console.file.getvalue()


def test_without_gold_it_writes_nothing_and_says_so(home: Path, tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run(tmp_path / "run", home, evaluation={"gold": False})
    (tmp_path / "run").mkdir()
    assert run_stage(run) == {"queries": 0}
    assert list((tmp_path / "run").iterdir()) == []
    assert isinstance(run.console.file, io.StringIO)
    assert "evaluation.gold is off" in run.console.file.getvalue()
