"""score: exact log-probs in the file's order, rewards, and a file that goes on where it was interrupted."""

import dataclasses
import functools
import importlib.util
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from almost_jax.commands import scoring
from almost_jax.core.heads import sequence_scores
from almost_jax.core.llama import LlamaConfig, Params, hidden_states, init_params, logits
from almost_jax.errors import InputError
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import Model, save_model
from almost_jax.io.progress import console_progress, stderr_progress
from almost_jax.io.records import read_records, write_records
from almost_jax.io.tokenizer import load_tokenizer

_spec = importlib.util.spec_from_file_location("models_commands", Path(__file__).with_name("test_models_commands.py"))
assert _spec is not None and _spec.loader is not None
_other = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_other)
command, make_model = _other.command, _other.make_model
_spec = importlib.util.spec_from_file_location("tokenizers_tests", Path(__file__).parents[1] / "io/test_tokenizer.py")
assert _spec is not None and _spec.loader is not None
_tokenizers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tokenizers)

LINES = [
    {"prompt": "w3 w4", "completion": "w5", "id": 7},
    {"prompt": "w9", "completion": "w3 w3 <eos> w11 w12 w13"},
    {"prompt": "w3 w4", "completion": ""},
    {"prompt": "w3 <eos> w4", "completion": "w5"},
    {"prompt": "w3 w4", "completion": "w5"},
]


@pytest.fixture(scope="module")
def reward() -> Model:
    return make_model("reward")


@functools.partial(jax.jit, static_argnums=1)
def forward(params: Params, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    return logits(params, config, hidden_states(params, config, tokens))


def alone(model: Model, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Log-probs of one completion, from the logits of the whole row."""
    row = [*prompt, *completion]
    padded = jnp.asarray([row + [0] * (16 - len(row))], jnp.int32)
    everything = jax.nn.log_softmax(forward(model.params, model.config, padded))
    return np.asarray([everything[0, len(prompt) - 1 + place, token] for place, token in enumerate(completion)])


def test_a_completion_is_encoded_as_what_stands_behind_its_prompt(tmp_path: Path):
    """Tokenizers of LLaMA 1 and 2 put a space before every text, which a completion hasn't."""
    _tokenizers.sentencepiece_like(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    config = LlamaConfig(tokenizer.vocab_size, 16, 8, 1, 2, 1, 8)
    model = Model(config, init_params(config, jax.random.key(0)), tokenizer, "policy", "here")
    lines = [{"prompt": "hello\n", "completion": "world"}, {"prompt": "he", "completion": " hello</s>"}]
    write_records(tmp_path / "in.jsonl", lines)
    scoring.score_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", 2, False, stderr_progress)
    for line, record in zip(lines, read_records(tmp_path / "out.jsonl"), strict=True):
        whole = tokenizer.encode(line["prompt"] + line["completion"])
        assert tokenizer.encode(line["prompt"]) + record["tokens"] == whole


def test_04_lines_are_scored_exactly_and_in_order(tmp_path: Path, capsys, reward: Model):
    save_model(tmp_path / "model", reward)
    write_records(tmp_path / "in.jsonl", LINES)
    out = tmp_path / "out.jsonl"
    code, _, err = command(
        capsys,
        "score",
        "--model",
        tmp_path / "model",
        "--input",
        tmp_path / "in.jsonl",
        "--out",
        out,
        "--batch-size",
        2,
    )
    assert (code, err) == (0, "")
    found = read_records(out)
    assert [{key: record[key] for key in line} for record, line in zip(found, LINES, strict=True)] == LINES
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5]
    prompts = [[3, 4], [9], [3, 4], [3, 1, 4], [3, 4]]
    completions = [[5], [3, 3, 1, 11, 12, 13], [], [5], [5]]
    for record, prompt, completion in zip(found, prompts, completions, strict=True):
        assert record["tokens"] == completion
        expected = alone(reward, prompt, completion)
        np.testing.assert_allclose(record["token_logprobs"], expected, atol=1e-5)
        assert record["logprob"] == pytest.approx(expected.sum(), abs=1e-5)
        text = [*prompt, *completion, 1]
        raw = sequence_scores(
            reward.params, reward.config, jnp.asarray([text], jnp.int32), jnp.asarray([len(text)], jnp.int32)
        )
        assert record["reward"] == pytest.approx((float(raw[0]) + 0.25) / 2.75, abs=1e-5)
    assert found[0]["token_logprobs"] == found[4]["token_logprobs"] != found[3]["token_logprobs"]


def test_28_an_interrupted_file_goes_on_and_ends_the_same(tmp_path: Path, reward: Model, monkeypatch):
    monkeypatch.setattr(scoring, "_BATCHES_AT_ONCE", 1)
    source, whole, out = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_records(source, LINES)
    scoring.score_file(reward, source, whole, 2, True, stderr_progress)
    data = whole.read_bytes()
    for size in (0, 5, data.index(b"\n") + 1, data.index(b"\n") + 9, len(data)):
        (tmp_path / "out.jsonl.partial").write_bytes(data[:size])
        console = Console(file=io.StringIO())
        scoring.score_file(reward, source, out, 2, True, functools.partial(console_progress, console))
        shown = [line.split("  ")[0] for line in console.file.getvalue().splitlines()]
        known = data[:size].count(b"\n")
        assert shown == list(dict.fromkeys([f"scored: {known}/5", "scored: 5/5"]))
        again = read_records(out)
        assert [one["tokens"] for one in again] == [one["tokens"] for one in read_records(whole)]
        for one, other in zip(again, read_records(whole), strict=True):
            np.testing.assert_allclose(one["token_logprobs"], other["token_logprobs"], atol=1e-5)
        assert not (tmp_path / "out.jsonl.partial").exists()
        out.unlink()
    partial = tmp_path / "out.jsonl.partial"
    other = dataclasses.replace(reward, reward_mean=3.0)
    for model, lines, said in (
        (other, LINES, "scored by another model"),
        (reward, [LINES[1], *LINES[1:]], "line 1: from another input"),
        (reward, LINES[:1], "has more lines than"),
    ):
        partial.write_bytes(b"".join(data.splitlines(keepends=True)[:3]))
        write_records(source, lines)
        with pytest.raises(InputError, match=said):
            scoring.score_file(model, source, out, 2, True, stderr_progress)
        assert not out.exists()


def test_05_a_mesh_of_eight_scores_as_one_device_does(tmp_path: Path, capsys, reward: Model):
    save_model(tmp_path / "model", reward)
    write_records(tmp_path / "in.jsonl", LINES)
    found = []
    for name, mesh in (("all", ()), ("mesh", ("--mesh", "data=2,fsdp=2,tensor=2")), ("fsdp", ("--mesh", "fsdp=8"))):
        given = ("--model", tmp_path / "model", "--input", tmp_path / "in.jsonl", "--out", tmp_path / name)
        assert command(capsys, "score", *given, "--batch-size", 3, *mesh)[0] == 0
        found.append(read_records(tmp_path / name))
    scoring.score_file(reward, tmp_path / "in.jsonl", tmp_path / "one", 2, True, stderr_progress)
    for records in found:
        for record, alone in zip(records, read_records(tmp_path / "one"), strict=True):
            assert record["tokens"] == alone["tokens"]
            np.testing.assert_allclose(record["token_logprobs"], alone["token_logprobs"], atol=1e-5)
            assert record["reward"] == pytest.approx(alone["reward"], abs=1e-5)


def test_12_a_reward_model_from_elsewhere_is_read_at_the_last_token(tmp_path: Path, capsys, reward: Model):
    save_llama(tmp_path / "theirs", reward.config, reward.params, "float32", reward.tokenizer)
    assert command(capsys, "import", tmp_path / "theirs", tmp_path / "ours")[0] == 0
    assert command(capsys, "export", tmp_path / "ours", tmp_path / "again")[0] == 0
    write_records(tmp_path / "in.jsonl", LINES[:1])
    raw = {
        end: float(sequence_scores(reward.params, reward.config, jnp.asarray([row]), jnp.asarray([len(row)]))[0])
        for end, row in ((False, [3, 4, 5]), (True, [3, 4, 5, 1]))
    }
    for place, name in enumerate(("theirs", "ours", "again")):
        for flag, end in ((), False), (("--end",), True), (("--no-end",), False):
            out = tmp_path / f"{place}{end}{len(flag)}.jsonl"
            given = ("--model", tmp_path / name, "--input", tmp_path / "in.jsonl", "--out", out)
            assert command(capsys, "score", *given, *flag)[0] == 0
            assert read_records(out)[0]["reward"] == pytest.approx(raw[end], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pad", [True, False])
def test_14_normalised_scores_of_an_exported_reward_model_are_equal_in_transformers(tmp_path: Path, capsys, pad: bool):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    save_model(tmp_path / "model", make_model("reward", pad=pad))
    write_records(tmp_path / "in.jsonl", LINES)
    given = ("--model", tmp_path / "model", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out")
    assert command(capsys, "score", *given)[0] == 0
    assert command(capsys, "export", tmp_path / "model", tmp_path / "theirs")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs", padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    texts = [[*tokenizer.encode(line["prompt"]), *tokenizer.encode(line["completion"])] for line in LINES]
    rows = tokenizer.pad({"input_ids": [[*text, tokenizer.eos_token_id] for text in texts]}, return_tensors="pt")
    with torch.no_grad():
        raw = model(**rows).logits[:, 0].numpy()
    found = [record["reward"] for record in read_records(tmp_path / "out")]
    # The second completion names the end of text in its letters, which stay letters here and not there.
    kept = [0, 2, 3, 4]
    theirs = (raw - model.config.reward_mean) / model.config.reward_std
    np.testing.assert_allclose(theirs[kept], np.asarray(found)[kept], atol=1e-4)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "w3"}', "line 2: completion is None; expected a text"),
        ('{"prompt": ["w3"], "completion": "w4"}', "line 2: prompt is ['w3']; expected a text"),
        ("{", "not JSON"),
        ('{"prompt": "", "completion": "w4"}', "line 2: prompt is empty"),
        (json.dumps({"prompt": "w3", "completion": "w4 " * 2048}), "line 2: 2049 tokens; the model reads 2048"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, said: str):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"prompt": "w3", "completion": "w4"}}\n{line}\n')
    with pytest.raises(InputError) as caught:
        scoring.score_file(make_model(), source, tmp_path / "out.jsonl", 2, True, stderr_progress)
    assert said in str(caught.value) and str(source) in str(caught.value) and not (tmp_path / "out.jsonl").exists()
