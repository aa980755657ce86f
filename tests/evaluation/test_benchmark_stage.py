"""The stage `benchmarks`: every model of a run, off unless given, taken up where it was left, shown in the report."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from almost_jax.commands.places import one_device
from almost_jax.errors import InputError
from almost_jax.evaluation import benchmark_stage as stage
from almost_jax.evaluation.judge import Judge, Reply
from almost_jax.experiments import load_experiment
from almost_jax.io.models import load_model, save_model
from almost_jax.io.records import write_records
from almost_jax.io.run import Run
from almost_jax.report.benchmarks import benchmark_tables
from almost_jax.report.tables import as_markdown

_spec = importlib.util.spec_from_file_location("questions", Path(__file__).with_name("test_benchmarks.py"))
assert _spec is not None and _spec.loader is not None
_other = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_other)

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "microworld.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a fine-tuned policy and a reward model, and the questions beside it."""
    place = tmp_path_factory.mktemp("run")
    model = load_model("microworld:small", one_device(), "float32")
    tuned = jax.tree.map(lambda leaf: leaf * 0.9, model.params)
    save_model(place / "run/sft/model", dataclasses.replace(model, params=tuned))
    kernel = np.random.default_rng(5).normal(size=model.config.hidden_size).astype(np.float32)
    params = {**model.params, "score": {"kernel": jax.numpy.asarray(kernel)}}
    save_model(place / "run/reward/model", dataclasses.replace(model, kind="reward", params=params, score_at_end=True))
    (place / "hhh.jsonl").write_text("".join(json.dumps(one) + "\n" for one in _other.COMPARISONS))
    (place / "mc.json").write_text(json.dumps(_other.QUESTIONS))
    questions = [{"question_id": 7, "text": "what is two ?"}, {"question_id": 3, "turns": ["how do i make a cake ?"]}]
    write_records(place / "questions.jsonl", questions)
    write_records(place / "answers.jsonl", [{"question_id": one, "text": "one ."} for one in (3, 7)])
    return place


def make_run(folder: Path, *overrides: str) -> Run:
    config = load_experiment(EXPERIMENT, ["evaluation.gold=false", *overrides])
    return Run(folder / "run", config, one_device(), False, Console(quiet=True))


def content(folder: Path, name: str) -> Any:
    return json.loads((folder / "run/evaluation" / name).read_text())


def test_off_unless_given(folder: Path):
    assert stage.run_stage(make_run(folder)) == {} and not (folder / "run/evaluation").exists()


def test_static_benchmarks_of_policies_and_reward_models(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(
        folder, f"evaluation.hhh={{data: {folder}/hhh.jsonl}}", f"evaluation.truthfulqa={{data: {folder}/mc.json}}"
    )
    found = stage.run_stage(run)
    names = ["vanilla", "sft", "reward"]
    assert list(found["hhh"]) == list(found["truthfulqa"]) == names
    figures = content(folder, "hhh.json")["models"]
    assert [figures[name]["decided_by"] for name in names] == ["logprobs", "logprobs", "rewards"]
    for name in names:
        whole = content(folder, f"hhh/{name}.json")
        assert len(whole["items"]) == 3 and whole["accuracy"] == figures[name]["accuracy"] == found["hhh"][name]
    before = {path: path.read_bytes() for path in (folder / "run/evaluation").rglob("*.json")}
    assert len(before) == 8
    # A run killed after its first models: what they gave is kept, what is missing is made the same.
    asked = []
    real = stage.evaluate
    monkeypatch.setattr(stage, "evaluate", lambda *given: asked.append(given[4].name) or real(*given))
    for name in ("hhh/reward.json", "hhh.json", "truthfulqa.json"):
        (folder / "run/evaluation" / name).unlink()
    assert stage.run_stage(run) == found and asked == ["reward.json"]
    assert {path: path.read_bytes() for path in (folder / "run/evaluation").rglob("*.json")} == before
    shown = "\n".join(as_markdown(table, escape=True) for table, _ in benchmark_tables(folder / "run"))
    assert f"{found['hhh']['reward']:.3f}" in shown and "| reward model " in shown and "MC1" in shown


def vicuna(folder: Path, **settings: object) -> str:
    given = {
        "questions": f"{folder}/questions.jsonl",
        "sampling": {"max_new_tokens": 6, "temperature": 0.0, "batch_size": 2},
        **settings,
    }
    return f"evaluation.vicuna={json.dumps(given)}"


def test_vicuna_by_the_runs_reward_model(folder: Path):
    prompt = {"prompt": "microworld:hhh:1"}
    found = stage.run_stage(make_run(folder, vicuna(folder, against="vanilla", **prompt)))
    assert list(found["vicuna"]) == ["sft"]
    result = content(folder, "vicuna/sft.json")
    assert [item["question_id"] for item in result["items"]] == [7, 3] and result["flips"] is None
    for item in result["items"]:
        assert item["verdict"] == ("win", "tie", "loss")[1 - int(np.sign(np.diff(item["scores"][0])[0] * -1))]
    assert result["win"] + result["tie"] + result["loss"] == 2 and result["against"] == "vanilla"
    shown = benchmark_tables(folder / "run")[-1]
    assert "win rate" in shown[0].header and "judged by" in shown[1]


def test_vicuna_without_replies_fails_and_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings = {"judge": "judge-1", "url": "http://127.0.0.1:9/v1", "attempts": 1, "pause": 0.0}
    for path in (folder / "run/evaluation/vicuna").glob("*.json"):
        path.unlink()
    run = make_run(folder, vicuna(folder, against=f"{folder}/answers.jsonl", **settings))
    with pytest.raises(InputError, match=r"vicuna: vanilla: 2 of 2 pairs have no verdict yet \(question 3: no conn"):
        stage.run_stage(run)
    with pytest.raises(InputError, match="the run has no rlsf; it has vanilla, sft"):
        stage.run_stage(make_run(folder, vicuna(folder, against="rlsf")))


def test_the_judges_caps_hold_for_all_models_together_and_its_replies_outlive_the_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    sent = []

    def send(self: Judge, client: object, body: dict[str, Any]) -> Reply:
        self._reserve(body)
        sent.append(body)
        return Reply("8 6")

    monkeypatch.setattr(Judge, "_send", send)
    settings = {"judge": "judge-1", "url": "http://127.0.0.1:9/v1", "attempts": 1, "pause": 0.0, "concurrency": 1}
    # Another prompt, so that the two models don't answer alike.
    given = {**settings, "against": f"{folder}/answers.jsonl", "prompt": "microworld:hhh:1"}
    for path in (folder / "run/evaluation/vicuna").glob("*.json"):
        path.unlink()
    with pytest.raises(InputError, match=r"vicuna: sft: 1 of 2 pairs .*the cap of 6 requests is reached"):
        stage.run_stage(make_run(folder, vicuna(folder, **given, max_requests=6)))
    assert len(sent) == 6
    shutil.rmtree(folder / "run/evaluation/vicuna")
    found = stage.run_stage(make_run(folder, vicuna(folder, **given, max_requests=2)))
    assert list(found["vicuna"]) == ["vanilla", "sft"] and len(sent) == 8
    assert len(list((folder / "run/judge_replies").iterdir())) == 8
