"""lm-evaluation-harness: its transformers backend gives what our model class and our evaluations give, item by item."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from almost_jax import cli
from almost_jax.commands.places import one_device
from almost_jax.errors import InputError
from almost_jax.evaluation import hhh, truthfulqa
from almost_jax.evaluation.choices import choice_likelihoods
from almost_jax.io.models import load_model
from almost_jax.io.transfer import export_model

_spec = importlib.util.spec_from_file_location("harness_tasks", Path(__file__).with_name("harness_tasks.py"))
assert _spec is not None and _spec.loader is not None
tasks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tasks)

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

# In the micro-world's words for the tiny model; long enough that the rolling windows of 40 tokens are several.
DOCUMENTS = [
    {
        "question": "Human: what is the town of sogo ?\n\nAssistant:",
        "choices": ["i do not know .", "the town is sogo .", "no"],
        "answer": 1,
        "text": "the town is sogo . you take the cake and you take the town and the cake is in the town of sogo",
    },
    {
        "question": "Human: how do i make a cake ?\n\nAssistant:",
        "choices": ["you take the cake .", "i will not help with that ."],
        "answer": 0,
        "text": " ".join(["i will not help with that , i do not know what the town of sogo is ."] * 4),
    },
    {"question": "Human: what", "choices": ["is it", "is"], "answer": 1, "text": "what is it"},
]
# Positions, so that contexts are cut and windows roll.
LENGTH = 40


def compare(found: dict[str, Any], expected: dict[str, Any], names: list[str], tolerance: float) -> None:
    for name in names:
        for one, other in zip(tasks.responses(found, name), tasks.responses(expected, name), strict=True):
            assert len(one) == len(other)
            for mine, theirs in zip(one, other, strict=True):
                if isinstance(theirs[0], str):
                    assert mine == theirs, name
                elif isinstance(theirs[0], tuple | list):
                    np.testing.assert_allclose(mine[0][0], theirs[0][0], atol=tolerance, err_msg=name)
                    assert mine[0][1] == theirs[0][1], f"{name}: greedy"
                else:
                    np.testing.assert_allclose(mine[0], theirs[0], atol=tolerance, err_msg=name)
        numbers = {key: value for key, value in expected["results"][name].items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            assert found["results"][name][key] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, key)


@pytest.mark.parametrize("name", ["truthfulqa_mc1", "truthfulqa_mc2"])
def test_the_prompt_is_the_harness_own(name: str) -> None:
    import jinja2
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    task = yaml.safe_load((folder / "truthfulqa_mc1.yaml").read_text(encoding="utf-8"))
    if name == "truthfulqa_mc2":
        # It takes over what it doesn't say.
        task |= yaml.load((folder / f"{name}.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)
    template = jinja2.Template(task["doc_to_text"], keep_trailing_newline=True)
    assert template.render(question="Why {{so}}?") == truthfulqa.prompt("Why {{so}}?")


@pytest.mark.slow
def test_every_kind_of_request_equals_the_transformers_backend(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra `parity`")
    import almost_jax.evaluation.harness  # noqa: F401

    export_model("microworld:small", tmp_path / "hf", None, 10**9, {})
    names = tasks.write_tasks(tmp_path, DOCUMENTS)
    theirs = {"pretrained": str(tmp_path / "hf"), "dtype": "float32", "max_length": LENGTH}
    expected = tasks.run("hf", theirs, tmp_path, names)
    found = tasks.run("almost_jax", {"pretrained": "microworld:small", "max_length": LENGTH}, tmp_path, names)
    compare(found, expected, names, 2e-3)
    greedy = [mine[0][0][1] for mine in tasks.responses(found, "local_last_word")]
    assert len(set(greedy)) == 2, "some last words are what the model would say, some are not"
    generated = [one[0][0] for one in tasks.responses(found, "local_generate")]
    assert any(generated) and len(set(generated)) > 1


@pytest.mark.slow
def test_the_command_hands_over_to_the_harness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks.write_tasks(tmp_path, DOCUMENTS[:2])
    before = list(sys.argv)
    arguments = ["lm-eval", "--model", "almost_jax", "--model_args", "pretrained=microworld:small,data=1,fsdp=8"]
    arguments += ["--tasks", "local_choices", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--batch_size", "3"])
    assert ended.value.code == 0 and sys.argv == before
    assert "local_choices" in capsys.readouterr().out
    written = next((tmp_path / "out").rglob("results_*.json"))
    shown = json.loads(written.read_text())["results"]["local_choices"]
    model = load_model("microworld:small", one_device(), "float32")
    right = []
    for one in DOCUMENTS[:2]:
        found, _ = choice_likelihoods(model, [(one["question"], f" {choice}") for choice in one["choices"]], 2)
        right.append(int(np.argmax([likelihood.total for likelihood in found])) == one["answer"])
    assert shown["acc,none"] == np.mean(right)


def test_a_reward_model_and_a_budget_without_room_are_refused(tmp_path: Path) -> None:
    from almost_jax.evaluation.harness import AlmostJax

    model = AlmostJax("microworld:small", data=1, fsdp=8, max_length=20, batch_size="auto")
    assert (model.max_length, model.batch_size) == (20, 16)

    class Asked:
        args = ("what is", {"until": ["."], "max_gen_toks": 20})

    with pytest.raises(InputError, match="max_gen_toks 20: leaves no room"):
        model.generate_until([Asked()], disable_tqdm=True)
    with pytest.raises(InputError, match="needs 3 devices"):
        AlmostJax("microworld:small", data=3)


def smollm2() -> tuple[Path, Any]:
    pytest.importorskip("torch", reason="needs the extra `parity`")
    folder = tasks.smollm2()
    if folder is None:
        pytest.skip("make smollm2 fetches the model; ALMOST_JAX_SMOLLM2 names its folder")
    return folder, load_model(str(folder), one_device(), "float32")


def count(default: int) -> int:
    """How many questions: ALMOST_JAX_ITEMS=1000 compares all that are there, which takes torch most of an hour."""
    return int(os.environ.get("ALMOST_JAX_ITEMS", default))


@pytest.mark.slow
def test_truthfulqa_on_smollm2_equals_the_harness_with_torch(tmp_path: Path) -> None:
    data = tasks.shared_data("truthfulqa_mc_200.json")
    if not data.is_file():
        pytest.skip(f"no questions in {data}; ALMOST_JAX_DATA names their folder")
    folder, model = smollm2()
    questions = truthfulqa.read_questions(data)[: count(8)]
    export_model(str(folder), tmp_path / "hf", None, 10**10, {})
    names = tasks.write_truthfulqa(tmp_path, questions)
    expected = tasks.run("hf", {"pretrained": str(tmp_path / "hf"), "dtype": "float32"}, tmp_path, names)
    items = truthfulqa.judge(model, questions, 16)
    for name, key, score in (("local_mc1", "mc1_targets", "mc1"), ("local_mc2", "mc2_targets", "mc2")):
        samples = sorted(expected["samples"][name], key=lambda sample: sample["doc_id"])
        for item, sample, answers in zip(items, samples, tasks.responses(expected, name), strict=True):
            theirs = [answer[0][0] for answer in answers]
            np.testing.assert_allclose(item[key]["logprobs"], theirs, atol=5e-3)
            assert item[score] == pytest.approx(sample["acc"], abs=2e-3), item["question"]


@pytest.mark.slow
def test_hhh_on_smollm2_equals_torch(tmp_path: Path) -> None:
    data = tasks.shared_data("hhh_alignment_half.jsonl")
    if not data.is_file():
        pytest.skip(f"no comparisons in {data}; ALMOST_JAX_DATA names their folder")
    folder, model = smollm2()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    everything = hhh.read_comparisons(data)
    comparisons = everything[:: max(len(everything) // count(8), 1)]
    export_model(str(folder), tmp_path / "hf", None, 10**10, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for item in hhh.judge(model, comparisons, 16):
        totals = []
        for choice in item["choices"]:
            before = tokenizer(item["prompt"], return_tensors="pt").input_ids
            whole = tokenizer(item["prompt"] + item["separator"] + choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logprobs = torch.log_softmax(theirs(whole).logits[0, :-1].float(), -1)
            taken = logprobs.gather(1, whole[0, 1:, None])[before.shape[1] - 1 :, 0]
            totals.append(float(taken.double().sum()))
        np.testing.assert_allclose(item["logprobs"], totals, atol=1e-2)
        assert item["right"] == hhh.verdict(totals, item["labels"]), item["prompt"]
