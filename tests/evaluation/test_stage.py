"""The evaluation of real models: questions from a file, scored by the reward models alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from almost_jax.evaluation.held_out import held_out_queries
from almost_jax.evaluation.stage import run_stage
from almost_jax.io.records import read_records, write_records
from almost_jax.io.run import Run
from almost_jax.stages.reward import RewardScorer, load_reward_model

QUESTIONS = ["what is the color of it ?", "what is red ?", "is it blue please ?", "what ?", "color of red please"]


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_records(path, [{"question_id": number, "turns": [text, "and now?"]} for number, text in enumerate(QUESTIONS)])
    return path


@pytest.fixture
def asking(
    home: Path, questions: Path, tmp_path: Path, make_run: Callable[..., Run]
) -> Callable[[], Run]:
    """A run over a copy of the stages' outputs that has no gold score but four of the questions."""
    folder = tmp_path / "run"
    shutil.copytree(home / "run", folder, ignore=lambda *_: ["evaluation", "evaluation_queries.jsonl"])
    settings = {"gold": False, "questions": str(questions), "queries": 4, "curve_queries": 3}
    return lambda: make_run(folder, home, queries={"source": "file", "file": "unused"}, evaluation=settings)


def test_28_it_scores_every_system_and_demonstration_and_resumes_to_the_byte(asking: Callable[[], Run]) -> None:
    run = asking()
    assert [query["text"] for query in held_out_queries(run)] == QUESTIONS[:4]
    summary = run_stage(run)
    assert set(summary) == {"prompted", "sft_self_play", "sft", "rlsf"}
    items = read_records(run.path("evaluation", "items.jsonl"))
    assert all(item["gold"] is None and item["kind"] is None for item in items)
    assert all(isinstance(item["as_is"], float) and isinstance(item["reward"], float) for item in items)
    assert {item["query"] for item in items} == set(QUESTIONS[:4])
    figures = json.loads(run.path("evaluation", "scores.json").read_text())
    assert figures["measures"] == ["reward", "as_is"]
    assert figures["policies"]["sft"]["reward"]["n"] == 4
    assert figures["policies"]["sft"]["reward"]["mean"] == pytest.approx(summary["sft"])
    assert figures["rlsf_curve"][0]["kl"] == 0
    assert not run.path("evaluation", "gold.json").exists()

    # The demonstrations' turns have the scores that a scorer gives them behind their dialogue.
    played = read_records(run.path("evaluation", "played.jsonl"))
    turns = read_records(run.path("demonstrations.jsonl"))[0]["turns"]
    scorer = RewardScorer(load_reward_model(run, "reward"), 4, print)
    expected = scorer.score([[{"role": turn["role"], "text": turn["text"]} for turn in turns]])
    assert [item["system"] for item in played] == ["self_play", "reward_guided"]
    np.testing.assert_allclose([item["reward"] for item in played], [expected[0]] * 2, rtol=1e-6)

    whole = {path.name: path.read_bytes() for path in run.path("evaluation").iterdir()}
    shutil.rmtree(run.path("evaluation"))
    run.path("evaluation").mkdir()
    for name, cut in (("items.jsonl", 900), ("played.jsonl", 100)):
        run.path("evaluation", f"{name}.partial").write_bytes(whole[name][:cut])
    run_stage(asking())
    assert {path.name: path.read_bytes() for path in run.path("evaluation").iterdir()} == whole


def test_without_an_as_is_model_there_is_one_measure(asking: Callable[[], Run]) -> None:
    run = asking()
    shutil.rmtree(run.path("as_is_reward"))
    run_stage(run)
    figures = json.loads(run.path("evaluation", "scores.json").read_text())
    assert figures["measures"] == ["reward"]
    assert set(figures["steps"]["rlsf - sft"]) == {"reward"}
