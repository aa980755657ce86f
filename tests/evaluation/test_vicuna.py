"""Win rates, rates at equal length, agreement of judges, and the recorded reviews of GPT-4."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from almost_jax.commands.places import one_device
from almost_jax.config import SamplingConfig
from almost_jax.errors import InputError
from almost_jax.evaluation import vicuna
from almost_jax.evaluation.answers import answer
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.models import load_model
from almost_jax.io.progress import stderr_progress
from almost_jax.io.records import write_records

_spec = importlib.util.spec_from_file_location("harness_tasks", Path(__file__).with_name("harness_tasks.py"))
assert _spec is not None and _spec.loader is not None
_tasks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tasks)

BOOTSTRAP = Bootstrap(200, 0)
DATA: Path = _tasks.shared_data("vicuna_bench")


@pytest.mark.parametrize(("model", "counts"), [("llama-13b", (3, 0, 77)), ("alpaca-13b", (3, 1, 76))])
def test_recorded_reviews_give_their_counts(model: str, counts: tuple[int, int, int]) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no recorded reviews in {DATA}; ALMOST_JAX_DATA names their folder")
    answers = [DATA / f"answers_{name}.jsonl" for name in (model, "vicuna-13b")]
    pairs = vicuna.read_pairs(DATA / "questions.jsonl", *answers)
    items = vicuna.read_reviews(DATA / f"gpt4_reviews_{model}_vicuna-13b.jsonl", pairs)
    found = vicuna.summarize(items, BOOTSTRAP)
    assert tuple(found[name] for name in vicuna.VERDICTS) == counts
    assert found["flips"] is None, "one order says nothing of flips"
    assert found["win_rate"]["mean"] == (counts[0] + counts[1] / 2) / 80
    assert found["length_controlled"]["n"] == 80
    # FastChat's prompt for the three questions of mathematics lets the judge solve them before it scores.
    read = {item["question_id"]: vicuna.parse_scores(item["replies"][0]["text"]) for item in items}
    assert [key for key, scores in read.items() if scores is None] == [68, 69, 70]
    assert all(read[item["question_id"]] in (None, tuple(item["scores"][0])) for item in items)


def test_reviews_without_scores_are_counted_not_scored(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "text": "8 9\n", "score": [8.0, 9.0]},
        {"question_id": 2, "text": "neither", "score": [-1, -1]},
        {"question_id": 3, "text": "7 7\nEqual."},
        {"question_id": 4, "text": "no"},
    ]
    write_records(tmp_path / "r.jsonl", rows)
    items = vicuna.read_reviews(tmp_path / "r.jsonl")
    assert [item["verdict"] for item in items] == ["loss", None, "tie", None]
    found = vicuna.summarize(items, BOOTSTRAP)
    assert found["unparsed"] == 2 and found["not_judged"] == 0 and found["length_controlled"] is None
    write_records(tmp_path / "r.jsonl", [rows[0], rows[0]])
    with pytest.raises(InputError, match="question_id 1 stands twice"):
        vicuna.read_reviews(tmp_path / "r.jsonl")
    write_records(tmp_path / "r.jsonl", [{"question_id": 1, "score": ["8", 9]}])
    with pytest.raises(InputError, match="expected .first, second."):
        vicuna.read_reviews(tmp_path / "r.jsonl")


def test_a_question_without_answer_is_named(tmp_path: Path) -> None:
    write_records(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["a?"]}, {"question_id": 2, "text": "b?"}])
    write_records(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}, {"question_id": 2, "text": "y"}])
    write_records(tmp_path / "b.jsonl", [{"question_id": 1, "text": "z"}])
    paths = [tmp_path / f"{name}.jsonl" for name in "qab"]
    with pytest.raises(InputError, match=r"b\.jsonl: no answer to question_id 2 \(1 missing\)"):
        vicuna.read_pairs(*paths)
    assert vicuna.read_pairs(paths[0], paths[1], paths[1])[0]["question"] == "a?"


def test_length_control_takes_out_what_length_explains() -> None:
    generator = np.random.default_rng(3)
    longer = generator.normal(100, 200, 8000)
    scaled = np.tanh(longer / longer.std())
    wins = (generator.random(8000) < 1 / (1 + np.exp(-(-0.5 + 3 * scaled)))).astype(float)
    found = vicuna.length_controlled(wins, longer, Bootstrap(50, 0))
    assert wins.mean() > 0.55
    assert found["mean"] == pytest.approx(1 / (1 + np.exp(0.5)), abs=0.03)
    assert found["ci95"][0] < found["mean"] < found["ci95"][1]


@pytest.mark.parametrize(("verdict", "rate"), [("win", 1.0), ("loss", 0.0)])
def test_verdicts_that_all_agree_are_not_certain(verdict: str, rate: float) -> None:
    item = {"verdict": verdict, "winners": [1], "lengths": [5, 9], "replies": []}
    found = vicuna.summarize([{**item, "question_id": number} for number in range(4)], BOOTSTRAP)
    for figure in ("win_rate", "length_controlled"):
        low, high = found[figure]["ci95"]
        assert found[figure]["mean"] == rate and low <= 0.5 <= high and {low, high} & {rate}


def test_length_control_at_the_edges() -> None:
    values = np.asarray([1.0, 0.0, 0.5, 1.0])
    assert vicuna.length_controlled(values, np.full(4, 7.0), BOOTSTRAP)["mean"] == pytest.approx(0.625, abs=1e-6)
    assert vicuna.length_controlled(np.zeros(5), np.arange(5.0), BOOTSTRAP)["mean"] == 0
    # Length separates wins from losses: no finite slope fits, the ridge holds it.
    apart = vicuna.length_controlled(np.asarray([0.0, 0, 1, 1]), np.asarray([-9.0, -5, 5, 9]), BOOTSTRAP)
    assert apart["mean"] == pytest.approx(0.5, abs=1e-6)


def test_kappa_by_hand() -> None:
    first = ["win"] * 5 + ["loss"] * 4 + ["tie", None]
    second = ["win"] * 4 + ["loss"] + ["loss"] * 3 + ["tie"] + ["tie", "win"]
    sides = [[{"question_id": n, "verdict": v} for n, v in enumerate(side)] for side in (first, second)]
    found = vicuna.compare_judges(*sides)
    # 8 of 10 agree; chance is .5 x .4 + .4 x .4 + .1 x .2 = .38.
    assert found["n"] == 10 and found["agreement"] == pytest.approx(0.8)
    assert found["kappa"] == pytest.approx((0.8 - 0.38) / 0.62)
    assert found["table"] == [[4, 0, 1], [0, 1, 0], [0, 1, 3]]
    same = [{"question_id": 0, "verdict": "win"}]
    assert vicuna.compare_judges(same, same)["kappa"] is None
    with pytest.raises(InputError, match="share no question"):
        vicuna.compare_judges(same, [{"question_id": 1, "verdict": "win"}])


def test_a_chat_template_ends_where_the_models_config_says_too(home: Path, tmp_path: Path) -> None:
    model = load_model(str(home / "vanilla"), one_device(), "float32")
    model = dataclasses.replace(
        model, tokenizer=model.tokenizer.with_chat_template("{{ messages[0]['content'] }} Assistant:")
    )
    questions = [{"question_id": 1, "question": "what is red"}]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6, batch_size=2)

    def said(asked: str, ends: Sequence[int]) -> tuple[int, str]:
        (found,) = answer(model, questions, asked, sampling, 3, tmp_path / asked, stderr_progress, ends)
        return found["tokens"], found["finish"]

    assert said("chat", ()) == (6, "length") == said("chat", [model.tokenizer.eos_id])
    # Every word ends the turn, and the answers of before are others'.
    assert said("chat", range(4, model.config.vocab_size)) == (0, "stop")
    assert len(list((tmp_path / "chat").glob("answers-*.jsonl"))) == 2
    # Without a template turns end as they do in the dialogues that were learned from.
    assert said("plain", range(4, model.config.vocab_size)) == said("plain", ())
    assert len(list((tmp_path / "plain").glob("answers-*.jsonl"))) == 1
