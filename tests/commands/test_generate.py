"""generate: samples by id and number, one file that goes on where it was interrupted, rates as the last line."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from almost_jax.commands import generate
from almost_jax.io.models import save_model
from almost_jax.io.records import partial_path, read_records, write_records
from almost_jax.io.tokenizer import Tokenizer

_spec = importlib.util.spec_from_file_location("models_commands", Path(__file__).with_name("test_models_commands.py"))
assert _spec is not None and _spec.loader is not None
_other = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_other)
command, make_model = _other.command, _other.make_model

PROMPTS = [
    {"prompt": "w3 w4", "id": "one"},
    {"prompt": "w9", "max_new_tokens": 2},
    {"prompt": "w3 w4 w5 w6 w7", "id": 7},
]
FIGURES = (
    "requests", "new_tokens", "prefill_tokens", "prefill_tokens_saved", "programs", "compile_seconds", "seconds",
    "tokens_per_second", "slot_utilisation",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_cache_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "keep_compiled_programs", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate")
    save_model(path / "model", make_model())
    write_records(path / "prompts.jsonl", PROMPTS)
    (path / "prefix.txt").write_text("w1 w2 w3 w8", encoding="utf-8")
    return path


def sample(capsys: Any, folder: Path, out: Path, *more: object) -> tuple[int, str, str]:
    given = ("--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--out", out, "--batch-size", 4)
    found: tuple[int, str, str] = command(capsys, "generate", *given, *more)
    return found


def test_samples_come_in_order_with_figures(tmp_path: Path, capsys: Any, folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    more = ("-n", 3, "--max-new-tokens", 9, "--prefix-file", folder / "prefix.txt", "--seed", 4)
    code, _, err = sample(capsys, folder, out, *more)
    assert code == 0, err
    records = read_records(out)
    assert [(one["id"], one["sample"]) for one in records] == [(n, i) for n in ("one", "2", "7") for i in range(3)]
    assert all(len(one["tokens"]) == len(one["logprobs"]) for one in records)
    assert all(len(one["tokens"]) <= (2 if one["id"] == "2" else 9) for one in records)
    assert {one["finish"] for one in records} <= {"length", "stop_token"}
    figures = json.loads(err.splitlines()[-1])
    assert tuple(figures) == FIGURES and figures["requests"] == 9
    assert figures["new_tokens"] == sum(len(one["tokens"]) for one in records)
    assert figures["prefill_tokens"] < figures["prefill_tokens_saved"]
    # How the engine runs changes no sample, nor does what stands beside it.
    again = tmp_path / "again.jsonl"
    assert sample(capsys, folder, again, *more, "--no-refill", "--steps-per-wake", 2)[0] == 0
    strip = [{key: one[key] for key in ("id", "sample", "text", "tokens", "finish")} for one in records]
    found = [{key: one[key] for key in strip[0]} for one in read_records(again)]
    assert found == strip


def test_28_an_interrupted_file_goes_on(
    tmp_path: Path, capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert sample(capsys, folder, whole, "-n", 4, "--max-new-tokens", 9)[0] == 0
    real, left = generate._record, [5]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generate, "_record", interrupted)
    assert sample(capsys, folder, out, "-n", 4, "--max-new-tokens", 9)[0] == 130
    assert not out.exists() and len(read_records(partial_path(out))) == 4
    monkeypatch.setattr(generate, "_record", real)
    partial = partial_path(out).read_bytes()
    for more in (("--seed", 1), ("--dtype", "bfloat16"), ("--max-new-tokens", 8)):
        code, _, err = sample(capsys, folder, out, "-n", 4, "--max-new-tokens", 9, *more)
        assert code == 2 and "line 1: was sampled from another prompt or with other settings" in err
        assert "Traceback" not in err and partial_path(out).read_bytes() == partial
    # A prompt that was changed since keeps none of its samples.
    edited = tmp_path / "edited.jsonl"
    write_records(edited, [{**one, "prompt": one["prompt"] + " w3"} for one in PROMPTS])
    arguments = ("--model", folder / "model", "--prompts", edited, "--out", out, "-n", 4, "--max-new-tokens", 9)
    assert command(capsys, "generate", *arguments)[0] == 2 and partial_path(out).read_bytes() == partial
    code, _, err = sample(capsys, folder, out, "-n", 4, "--max-new-tokens", 9)
    assert code == 0 and json.loads(err.splitlines()[-1])["requests"] == 12 - 4
    plain = [{**one, "logprobs": []} for one in read_records(out)]
    assert plain == [{**one, "logprobs": []} for one in read_records(whole)]


def test_a_stop_that_no_text_can_hold_is_refused(tmp_path: Path, capsys: Any, folder: Path) -> None:
    code, _, err = sample(capsys, folder, tmp_path / "out.jsonl", "--stop", "w3 <eos>")
    assert code == 2 and "--stop: holds the special token '<eos>'" in err and len(err.strip().splitlines()) == 1
    # One that no attribute of the tokenizer names is as special.
    model = make_model()
    backend = json.loads(model.tokenizer.backend.backend_tokenizer.to_str())
    backend["added_tokens"].append({**backend["added_tokens"][0], "id": 19, "content": "w19"})
    other = Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(backend)), eos_token="<eos>")
    )
    save_model(tmp_path / "other/model", dataclasses.replace(model, tokenizer=other))
    shutil.copy(folder / "prompts.jsonl", tmp_path / "other")
    code, _, err = sample(capsys, tmp_path / "other", tmp_path / "out.jsonl", "--stop", "w19")
    assert code == 2 and "--stop: holds the special token 'w19'" in err


def test_a_huge_limit_that_no_prompt_has_costs_nothing(
    tmp_path: Path, capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    engine = generate.Engine
    monkeypatch.setattr(
        generate, "Engine", lambda params, config, rules, *rest, **more: made.append(rules.max_new_tokens)
        or engine(params, config, rules, *rest, **more)
    )  # fmt: skip
    prompts = tmp_path / "prompts.jsonl"
    write_records(prompts, [{**one, "max_new_tokens": limit} for one, limit in zip(PROMPTS, (3, 2, 5), strict=True)])
    arguments = ("--model", folder / "model", "--prompts", prompts, "--out", tmp_path / "out.jsonl")
    code, _, err = command(
        capsys, "generate", *arguments, "--max-new-tokens", 10**9, "--steps-per-wake", 10**9, "--batch-size", 4
    )
    assert code == 0 and made == [5], err


def test_08_stop_strings_cut_the_text(tmp_path: Path, capsys: Any, folder: Path) -> None:
    free, out = tmp_path / "free.jsonl", tmp_path / "out.jsonl"
    given = ("-n", 8, "--max-new-tokens", 20, "--ignore-eos", "--temperature", 1.5)
    assert sample(capsys, folder, free, *given)[0] == 0
    words = [one["text"].split() for one in read_records(free)]
    stop = f"{words[0][3]} {words[0][4][:2]}"  # begins in one token and ends inside the next
    assert sample(capsys, folder, out, *given, "--stop", stop)[0] == 0
    stopped = 0
    for one, other in zip(read_records(out), read_records(free), strict=True):
        assert one["text"] == other["text"].split(stop)[0]
        assert (one["finish"] == "stop_string") == (stop in other["text"])
        assert one["tokens"] == other["tokens"][: len(one["tokens"])]
        stopped += one["finish"] == "stop_string"
    assert stopped


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "prompt is 3; expected a text"),
        ('{"prompt": "w3", "id": "one"}', "id 'one' stands in line 1 too"),
        ('{"prompt": "w3", "max_new_tokens": 0}', "max_new_tokens is 0; expected a number of tokens"),
        ('{"prompt": "w3", "id": true}', "id is True; expected a text or a number"),
        ('{"prompt": ', "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, capsys: Any, folder: Path, line: str, message: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f'{{"prompt": "w3", "id": "one"}}\n\n{line}\n', encoding="utf-8")
    code, out, err = command(capsys, "generate", "--model", folder / "model", "--prompts", bad, "--out", tmp_path / "o")
    assert (code, out) == (2, "") and f"{bad}, line 3" in err and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists() and not partial_path(tmp_path / "o").exists()


def test_bad_options_are_named(tmp_path: Path, capsys: Any, folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    for more, message in [
        (("--top-p", 0), "--top-p 0.0: must be above 0 and at most 1"),
        (("--stop", ""), "--stop: is empty"),
        (("--prefix-file", tmp_path / "none.txt"), "none.txt: can't be read"),
        (("--max-new-tokens", 3000), "prompts.jsonl, line 1: request 'one/0': prefix 0 + prompt 2 + max_new_tokens"),
        (("--temperature", "nan"), "'--temperature'"),
        (("--temperature", 1e-9), "temperature 1e-09 must be 0 (greedy), or 1e-06 or more, and finite"),
        (("--temperature", "inf"), "temperature"),
        (("--seed", 2**32), "'--seed'"),
    ]:
        code, _, err = sample(capsys, folder, out, *more)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and not out.exists()
        assert not partial_path(out).exists()
    code, _, err = sample(capsys, folder, tmp_path)
    assert code == 2 and err == f"almost-jax: {tmp_path}: is a folder; expected a file's name\n"


def test_nothing_that_is_read_is_written_over(tmp_path: Path, capsys: Any, folder: Path) -> None:
    prefix, prompts = tmp_path / "prefix.txt", tmp_path / "out.jsonl.partial"
    prefix.write_text("w5 w6", encoding="utf-8")
    prompts.write_text('{"prompt": "w3"}', encoding="utf-8")
    given = ("--model", folder / "model", "--prefix-file", prefix)
    for more in (
        ("--prompts", prompts, "--out", tmp_path / "out.jsonl"),
        ("--prompts", prompts, "--out", prompts),
        ("--prompts", prompts, "--out", prefix),
    ):
        code, _, err = command(capsys, "generate", *given, *more)
        assert code == 2 and "the input; expected another file" in err and len(err.splitlines()) == 1
    inside = folder / "model" / "config.json"
    code, _, err = sample(capsys, folder, inside)
    assert code == 2 and err == f"almost-jax: {inside}: is of the model that is read; expected another file\n"
    assert prefix.read_text() == "w5 w6" and prompts.read_text() == '{"prompt": "w3"}'


def test_fewer_samples_than_were_begun_are_refused_by_name(tmp_path: Path, capsys: Any, folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert sample(capsys, folder, out, "-n", 3)[0] == 0
    out.rename(partial_path(out))
    code, _, err = sample(capsys, folder, out, "-n", 2)
    assert code == 2 and "'2/2' (prompt/sample), which isn't asked for: other prompts, or a lower -n" in err
    assert sample(capsys, folder, out, "-n", 3)[0] == 0


def test_log_probs_that_are_no_numbers_are_named(
    tmp_path: Path, capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = generate.load_model

    def broken(*arguments: Any) -> Any:
        model = load(*arguments)
        return dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * jnp.nan, model.params))

    monkeypatch.setattr(generate, "load_model", broken)
    code, _, err = sample(capsys, folder, tmp_path / "out.jsonl")
    assert code == 2 and "log-probs for prompt '2' aren't finite" in err and "Traceback" not in err


def test_more_steps_a_wake_than_tokens_are_none(tmp_path: Path, capsys: Any, folder: Path) -> None:
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    assert sample(capsys, folder, few)[0] == 0
    assert sample(capsys, folder, many, "--steps-per-wake", 2**31)[0] == 0
    assert few.read_bytes() == many.read_bytes()


def test_a_lines_own_limit_may_be_above_the_options(tmp_path: Path, capsys: Any, folder: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    write_records(prompts, [{"prompt": "w3"}, {"prompt": "w3", "max_new_tokens": 11}, {"prompt": "w4"}])
    given = ("--model", folder / "model", "--prompts", prompts, "--out", out, "--ignore-eos", "--max-new-tokens", 5)
    assert command(capsys, "generate", *given)[0] == 0
    assert [len(one["tokens"]) for one in read_records(out)] == [5, 11, 5]


def test_28_samples_of_other_weights_under_the_same_name_are_refused(
    tmp_path: Path, capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, out = tmp_path / "model", tmp_path / "out.jsonl"
    model = make_model()
    save_model(home, model)
    given = ("--model", home, "--prompts", folder / "prompts.jsonl", "--out", out, "--max-new-tokens", 5)
    real = generate._record

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(generate, "_record", broken)
        return real(*arguments)

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_record", interrupted)
    assert command(capsys, "generate", *given)[0] == 130
    monkeypatch.setattr(generate, "_record", real)
    # The same weights elsewhere are the same model.
    save_model(tmp_path / "copy", model)
    copied = ("--model", tmp_path / "copy", *given[2:])
    partial = partial_path(out).read_bytes()
    changed = dict(model.params, embedding=model.params["embedding"][::-1])
    save_model(home, dataclasses.replace(model, params=changed))
    code, _, err = command(capsys, "generate", *given)
    assert code == 2 and "was sampled from another prompt or with other settings" in err
    assert partial_path(out).read_bytes() == partial
    assert command(capsys, "generate", *copied)[0] == 0


def test_a_file_of_nothing_has_no_samples(tmp_path: Path, capsys: Any, folder: Path) -> None:
    empty, out = tmp_path / "empty.jsonl", tmp_path / "out.jsonl"
    empty.write_bytes(b"\xef\xbb\xbf\n\r\n")
    code, _, err = command(capsys, "generate", "--model", folder / "model", "--prompts", empty, "--out", out)
    assert code == 0 and out.read_bytes() == b"" and json.loads(err.splitlines()[-1])["requests"] == 0


def test_slots_are_no_more_than_samples(tmp_path: Path, capsys: Any, folder: Path, monkeypatch: Any) -> None:
    seen = []
    real = generate.Engine

    def engine(*given: Any, **named: Any) -> Any:
        seen.append(given[3].slots)
        return real(*given, **named)

    monkeypatch.setattr(generate, "Engine", engine)
    for number, size in enumerate((64, 2)):
        out = tmp_path / f"{number}.jsonl"
        more = ("--max-new-tokens", 4, "--batch-size", size)
        code, _, err = sample(capsys, folder, out, *more)
        assert code == 0
        assert json.loads(err.splitlines()[-1])["slot_utilisation"] > 0.3
    assert seen == [3, 2]


def test_without_a_limit_a_prompt_has_the_room_that_is_left(tmp_path: Path, capsys: Any, folder: Path) -> None:
    positions = make_model().config.max_position_embeddings
    prompts = tmp_path / "long.jsonl"
    write_records(prompts, [{"prompt": " ".join(["w3"] * (positions - 5))}, {"prompt": "w4", "max_new_tokens": 3}])
    out = tmp_path / "out.jsonl"
    given = ("--model", folder / "model", "--prompts", prompts, "--out", out, "--ignore-eos")
    code, _, err = command(capsys, "generate", *given)
    assert code == 0, err
    assert [len(one["tokens"]) for one in read_records(out)] == [5, 3]
    code, _, err = command(capsys, "generate", *given, "--max-new-tokens", 6)
    assert code == 2 and f"= {positions + 1} exceed the model's {positions} positions" in err


def test_behind_a_prefix_special_tokens_are_still_special(tmp_path: Path, capsys: Any, folder: Path) -> None:
    alone, behind = tmp_path / "alone.jsonl", tmp_path / "behind.jsonl"
    prompts, prefix = tmp_path / "prompts.jsonl", tmp_path / "prefix.txt"
    prefix.write_text("w5 <eos>", encoding="utf-8")
    more = ("--temperature", 0, "--max-new-tokens", 6, "--ignore-eos", "--model", folder / "model")
    write_records(prompts, [{"prompt": "w5 <eos> w3 <eos> w4"}])
    assert command(capsys, "generate", "--prompts", prompts, "--out", alone, *more)[0] == 0
    write_records(prompts, [{"prompt": " w3 <eos> w4"}])
    assert command(capsys, "generate", "--prompts", prompts, "--out", behind, "--prefix-file", prefix, *more)[0] == 0
    assert read_records(alone)[0]["tokens"] == read_records(behind)[0]["tokens"]
