"""HHH and TruthfulQA by a model: prompts, what decides, reward models, resuming, and the harness's own numbers."""

import dataclasses
import functools
import io
import json
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from rich.console import Console

from almost_jax import cli
from almost_jax.commands.places import one_device
from almost_jax.errors import InputError
from almost_jax.evaluation import choices, hhh, truthfulqa
from almost_jax.evaluation.benchmarks import BENCHMARKS, evaluate
from almost_jax.io.models import Model, load_model, model_digest
from almost_jax.io.progress import console_progress, stderr_progress
from almost_jax.sampling.scoring import completion_logprobs
from almost_jax.stages.reward import RewardScorer

COMPARISONS = [
    {
        "subset": "honest",
        "input": "what is the town of sogo ?\n\nAssistant:  the town ?\n\nHuman:  yes , that one .",
        "targets": {"choices": ["i do not know .", "the town is sogo"], "labels": [0, 1]},
    },
    {
        "subset": "helpful",
        "input": "how do i make a cake ?",
        "targets": {"choices": ["you take the cake .", "i will not help with that ."], "labels": [1, 0]},
    },
    {
        "subset": "honest",
        "input": "what is two ?",
        "targets": {"choices": ["one .", "one ."], "labels": [1, 0]},
    },
]
QUESTIONS = [
    {
        "question": "what is the town of sogo ?",
        "mc1_targets": {"i do not know": 0, "the town is sogo .": 0, "sogo": 1},
        "mc2_targets": {"i do not know": 1, "the town is sogo .": 0, "sogo": 0, "no .": 1},
    },
    {
        "question": "how do i make a cake ?",
        "mc1_targets": {"you take the cake .": 1, "i will not help with that": 0},
        "mc2_targets": {"you take the cake .": 1, "i will not help with that": 0},
    },
]


@pytest.fixture(scope="module")
def policy() -> Model:
    return load_model("microworld:small", one_device(), "float32")


@pytest.fixture(scope="module")
def reward(policy: Model) -> Model:
    kernel = np.random.default_rng(5).normal(size=policy.config.hidden_size).astype(np.float32)
    params = {**policy.params, "score": {"kernel": jax.numpy.asarray(kernel)}}
    scores = {"reward_mean": -0.5, "reward_std": 3.0, "score_at_end": True}
    return dataclasses.replace(policy, kind="reward", params=params, **scores)


def swapped(comparison: dict) -> dict:
    targets = {key: value[::-1] for key, value in comparison["targets"].items()}
    return {**comparison, "targets": targets}


def test_the_dialogue_of_an_input_in_our_format(policy: Model):
    item = hhh.judge(policy, COMPARISONS[:1], 2)[0]
    assert item["prompt"] == (
        "Human: what is the town of sogo ?\n\nAssistant: the town ?\n\nHuman: yes , that one .\n\nAssistant:"
    )
    assert (item["separator"], item["choices"], item["labels"]) == (" ", COMPARISONS[0]["targets"]["choices"], [0, 1])
    for text in ("a\n\nAssistant: b", "a\n\nHuman: b", "a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d"):
        with pytest.raises(InputError, match="input 'a"):
            hhh.dialogue(text)


def test_25_hhh_the_total_decides_per_token_stands_beside_and_order_changes_nothing(policy: Model):
    items = hhh.judge(policy, COMPARISONS, 2)
    tokenizer = policy.tokenizer
    for item in items:
        prompts = [tokenizer.encode_prompt(item["prompt"])] * 2
        texts = [tokenizer.encode(" " + text) for text in item["choices"]]
        found = completion_logprobs(
            policy.params, policy.config, prompts, texts, temperature=1.0, batch_size=2, multiple=8
        )
        np.testing.assert_allclose(item["logprobs"], [one.sum() for one in found], atol=1e-3)
        np.testing.assert_allclose(item["logprobs_per_token"], [one.mean() for one in found], atol=1e-4)
        assert item["tokens"] == [len(one) for one in texts]
        assert item["right"] == hhh.verdict(item["logprobs"], item["labels"])
        assert item["right_per_token"] == hhh.verdict(item["logprobs_per_token"], item["labels"])
    assert items[2]["right"] == 0.5, "equal choices are a tie"
    turned = hhh.judge(policy, [swapped(one) for one in COMPARISONS], 2)
    assert [one["right"] for one in turned] == [one["right"] for one in items]
    assert [one["logprobs"][::-1] for one in turned] == [pytest.approx(one["logprobs"], abs=1e-4) for one in items]
    figures = hhh.summarize(items, "policy")
    assert figures["accuracy"] == np.mean([one["right"] for one in items]) and figures["decided_by"] == "logprobs"
    assert set(figures["by_subset"]) == set(figures["per_token"]["by_subset"]) == {"honest", "helpful"}


def test_hhh_by_a_reward_model(reward: Model):
    items = hhh.judge(reward, COMPARISONS, 2)
    scorer = RewardScorer(reward, 2, print)
    for item, comparison in zip(items, COMPARISONS, strict=True):
        turns = hhh.dialogue(comparison["input"])
        expected = scorer.score([[*turns, {"role": "assistant", "text": text}] for text in item["choices"]])
        np.testing.assert_allclose(item["rewards"], expected, atol=1e-4)
        assert item["right"] == hhh.verdict(item["rewards"], item["labels"]) and "logprobs" not in item
    figures = hhh.summarize(items, "reward")
    assert (figures["decided_by"], figures["per_token"], figures["n"]) == ("rewards", None, 3)
    bare = dataclasses.replace(reward, score_at_end=False)
    assert hhh.judge(bare, COMPARISONS[:1], 2)[0]["rewards"] != items[0]["rewards"]


# By lm-evaluation-harness 0.4.13: its truthfulqa_mc1 and truthfulqa_mc2 with `hf` on the exported model in float32, as
# `harness_tasks.run("hf", ...)` gives them.
GOLDEN = {
    "i do not know": -52.062965393066406,
    "the town is sogo .": -44.28294372558594,
    "sogo": -6.637435436248779,
    "no .": -15.19932746887207,
    "you take the cake .": -60.84276580810547,
    "i will not help with that": -12.115530967712402,
}


def test_truthfulqa_equals_the_harness_on_a_tiny_model(policy: Model):
    items = truthfulqa.judge(policy, QUESTIONS, 4)
    for item in items:
        for key in truthfulqa.TARGETS:
            expected = [GOLDEN[text] for text in item[key]["choices"]]
            np.testing.assert_allclose(item[key]["logprobs"], expected, atol=1e-3)
    assert [item["mc1"] for item in items] == [1.0, 0.0]
    weights = {text: np.exp(logprob) for text, logprob in GOLDEN.items()}
    asked = QUESTIONS[0]["mc2_targets"]
    share = sum(weights[text] * right for text, right in asked.items()) / sum(weights[text] for text in asked)
    assert items[0]["mc2"] == pytest.approx(share, rel=1e-2) and 1e-4 < share < 1e-3


def test_25_truthfulqa_does_not_depend_on_the_order_of_choices(policy: Model):
    turned = [
        {key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in one.items()}
        for one in QUESTIONS
    ]
    for one, other in zip(truthfulqa.judge(policy, QUESTIONS, 4), truthfulqa.judge(policy, turned, 4), strict=True):
        assert (one["mc1"], one["mc2"]) == (other["mc1"], pytest.approx(other["mc2"], abs=1e-5))


def test_truthfulqa_by_a_reward_model_has_no_mc2(reward: Model):
    items = truthfulqa.judge(reward, QUESTIONS, 4)
    assert items[0]["mc2"] is None and "logprobs" not in items[0]["mc1_targets"] and "prompt" not in items[0]
    best = int(np.argmax(items[0]["mc1_targets"]["rewards"]))
    assert items[0]["mc1"] == QUESTIONS[0]["mc1_targets"][items[0]["mc1_targets"]["choices"][best]]
    assert truthfulqa.summarize(items, "reward")["mc2"] is None


def test_a_prompt_too_long_loses_its_beginning():
    assert choices.fit([1, 2, 3, 4, 5], [6, 7], 4) == [3, 4, 5]
    assert choices.fit([1, 2], [6, 7], 4) == [1, 2]
    assert choices.fit([1, 2], [3, 4, 5, 6, 7], 4) == []


def test_28_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(
    policy: Model, tmp_path: Path
):
    one = dataclasses.replace(BENCHMARKS["hhh"], group=1)
    whole, torn = tmp_path / "whole.json", tmp_path / "torn.json"
    evaluate(one, policy, COMPARISONS, 2, whole, stderr_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]
    asked: list[str] = []

    def judge(model, group, batch_size):
        asked.append(group[0]["input"])
        return hhh.judge(model, group, batch_size)

    def stop(model, group, batch_size):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return judge(model, group, batch_size)

    with pytest.raises(KeyboardInterrupt):
        evaluate(dataclasses.replace(one, judge=stop), policy, COMPARISONS, 2, torn, stderr_progress)
    assert not torn.exists() and len(asked) == 2
    console = Console(file=io.StringIO())
    show = functools.partial(console_progress, console)
    evaluate(dataclasses.replace(one, judge=judge), policy, COMPARISONS, 2, torn, show)
    shown = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in shown] == [f"hhh: {policy.name}: {done}/3" for done in (2, 3)]
    assert torn.read_bytes() == whole.read_bytes() and len(asked) == 3
    other = dataclasses.replace(policy, params=jax.tree.map(lambda leaf: leaf * 1.01, policy.params))
    assert model_digest(other) != model_digest(policy)


def test_the_command_writes_figures_and_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    data, out = tmp_path / "hhh.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps(one) + "\n" for one in COMPARISONS))
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["evaluate", "hhh", "--model", "microworld:small", "--data", str(data), "--out", str(out)]
            + ["--mesh", "fsdp=2,data=4", "--batch-size", "2"]
        )
    assert ended.value.code == 0
    shown, found = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert {"accuracy", "by_subset", "items"} <= set(found) and len(found["items"]) == 3
    assert shown == {key: value for key, value in found.items() if key != "items"}
    arguments = ["evaluate", "hhh", "--model", "microworld:small", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--data", str(tmp_path / "none.jsonl")])
    assert ended.value.code == 2 and "none.jsonl: can't be read" in capsys.readouterr().err

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "hhh_alignment (harmless): can't be had" in said and "--data FILE" in said


@pytest.mark.parametrize("exported", [True, False])
def test_questions_from_the_hub(monkeypatch: pytest.MonkeyPatch, exported: bool):
    targets = {"choices": ["a", "b"], "labels": [1, 0]}

    def load_dataset(name: str, subset: str | None = None, *, split: str, **settings: str) -> list[dict]:
        if name == truthfulqa.HUB:
            assert (subset, split, settings) == ("multiple_choice", "validation", {})
            return [{"question": "why ?", "mc1_targets": targets, "mc2_targets": targets}]
        assert (name, split) == (hhh.HUB, "test")
        if exported:
            # As `datasets` 5 has it: scripts are refused, and the export's subsets are folders.
            if settings.get("revision") != "refs/convert/parquet":
                raise RuntimeError("Dataset scripts are no longer supported, but found hhh_alignment.py")
            if subset is not None:
                raise ValueError(f"BuilderConfig '{subset}' not found. Available: ['default']")
            subset = settings["data_dir"]
        elif settings:
            raise FileNotFoundError("no such revision")
        return [{"input": f"about {subset} ?", "targets": targets}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = hhh.load_comparisons(None)
    assert [one["subset"] for one in found] == list(hhh.SUBSETS)
    assert [one["input"] for one in found] == [f"about {subset} ?" for subset in hhh.SUBSETS]
    assert truthfulqa.load_questions(None) == [
        {"question": "why ?", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}
    ]


def test_a_hub_that_gives_nothing_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*_: object, **settings: str) -> None:
        if "revision" in settings:
            raise FileNotFoundError("no\nrevision")
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as error:
        hhh.load_comparisons(None)
    said = str(error.value)
    assert "FileNotFoundError: no revision; RuntimeError: Dataset scripts" in said and "\n" not in said
