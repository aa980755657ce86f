"""doctor: all well on the shipped model, and a way out on models and tokenizers that are broken on purpose."""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almost_jax.commands import doctor, invariants
from almost_jax.commands.places import one_device
from almost_jax.errors import InputError
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.stops import StopStrings

_spec = importlib.util.spec_from_file_location("models_commands", Path(__file__).with_name("test_models_commands.py"))
assert _spec is not None and _spec.loader is not None
_other = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_other)
command = _other.command


@pytest.fixture(scope="module")
def small() -> Model:
    return load_model("microworld:small", one_device(), "float32")


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    found: Tokenizer = _other.letters()
    return found


def test_all_is_well_on_the_shipped_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The eight devices of the test suite are those of statement 5."""
    code, out, _ = command(capsys, "doctor", "--model", "microworld:small")
    assert code == 0 and out.endswith("all is well\n"), out
    lines = out.splitlines()
    for name in ("versions", "devices", "memory", "compiled programs", "disk", "model", "weights are finite"):
        assert any(line.startswith(f"pass    {name}: ") for line in lines), name
    for number in (3, 5, 7, 8, 16):
        assert any(line.startswith(f"pass    {number} ") for line in lines), number
    assert "8 devices are one device: meshes 2x2x2" in out


def test_one_device_asks_a_process_with_eight(monkeypatch: pytest.MonkeyPatch, small: Model) -> None:
    asked: list[list[str]] = []

    class Ran:
        returncode = 0
        stdout = "noise\n" + json.dumps({"name": "5", "outcome": "pass", "seen": "as one", "fix": ""})
        stderr = ""

    def run(arguments: Sequence[str], **settings: object) -> Ran:
        asked.append(list(arguments))
        environment = settings["env"]
        assert isinstance(environment, dict)
        assert environment["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
        return Ran()

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(doctor.jax, "devices", lambda: [jax.local_devices()[0]])
    assert doctor._devices(small, "microworld:small").seen == "as one"
    assert asked[0][-4:] == ["doctor", "--model", "microworld:small", "--devices-only"]
    Ran.stdout, Ran.stderr = "", "Traceback\nMemoryError: too large"
    found = doctor._devices(small, "microworld:small")
    assert found.outcome == "FAIL" and "MemoryError: too large" in found.seen and "--devices-only" in found.fix
    # Where memory is short it says so and does not try.
    monkeypatch.setattr(doctor, "memory_free", lambda: 1000)
    found = doctor._devices(small, "microworld:small")
    assert found.outcome == "skipped" and "GiB are free" in found.seen and len(asked) == 2


def test_the_hidden_half_prints_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "doctor", "--model", "microworld:small", "--devices-only")
    found = json.loads(out)
    assert code == 0 and found["outcome"] == "pass" and found["name"] == "5 8 devices are one device"


def test_a_model_with_nan_weights_is_named_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Model
) -> None:
    kernel = small.params["layers"]["mlp"]["up"]["kernel"]
    layers = {**small.params["layers"]}
    layers["mlp"] = {**layers["mlp"], "up": {"kernel": kernel.at[1, 2, 3].set(jnp.nan)}}
    save_model(tmp_path / "broken", dataclasses.replace(small, params={**small.params, "layers": layers}))
    code, out, _ = command(capsys, "doctor", "--model", tmp_path / "broken")
    assert code == 1 and out.endswith("1 failed, 1 skipped\n")
    assert "FAIL    weights are finite: 1 of" in out and "layers/mlp/up/kernel are NaN or infinite" in out
    assert "-> the checkpoint is broken: import it again" in out
    assert "skipped 3, 5, 7, 16" in out


class Broken(Tokenizer):
    """A tokenizer that decodes in its own way."""

    def __init__(self, base: Tokenizer, how: str) -> None:
        self._base, self._how = base, how
        self.eos_id, self.pad_id, self.bos_id, self.unk_id = base.eos_id, base.pad_id, base.bos_id, None
        self.vocab_size = base.vocab_size

    def encode(self, text: str) -> list[int]:
        if self._how == "letters":
            return [3 + ord(letter) for letter in text]
        if self._how == "no numbers":
            return self._base.encode("".join(letter for letter in text if not letter.isdigit()))
        return self._base.encode(text)

    def single_token(self, text: str) -> int | None:
        return None if self._how == "letters" else self._base.single_token(text)

    def decode_exactly(self, ids: Sequence[int]) -> str:
        if self._how == "letters":
            return "".join(chr(token - 3) for token in ids).replace("\n", "")
        text = self._base.decode_exactly(ids)
        # What comes last decides how all of it is written.
        return text.upper() if self._how == "moody" and len(ids) % 2 else text


def test_a_tokenizer_whose_text_does_not_grow_is_told_how_to(small: Model, letters: Tokenizer) -> None:
    found = invariants.check_tokenizer(Broken(letters, "moody"))
    assert found.outcome == "FAIL" and "which is not how the text begins" in found.seen and "decoder" in found.fix
    # Its vocabulary has none of the texts whole, so some of its own words are spelled.
    found = invariants.check_tokenizer(small.tokenizer)
    assert found.outcome == "pass" and "words of its own" in found.seen


def test_a_tokenizer_that_loses_letters_is_told_which(small: Model, letters: Tokenizer) -> None:
    found = invariants.check_tokenizer(letters)
    assert found.outcome == "pass" and found.seen.startswith("4 of 4 texts, after each of")
    found = invariants.check_tokenizer(Broken(letters, "no numbers"))
    assert found.outcome == "FAIL" and "'Two lines:" in found.seen and "letters are lost" in found.fix
    assert invariants.check_stops(letters).outcome == "pass"


def test_a_sampler_that_misses_a_stop_is_called_out(monkeypatch: pytest.MonkeyPatch, letters: Tokenizer) -> None:
    first = StopStrings.first
    monkeypatch.setattr(
        StopStrings, "first", lambda self, tokens, checked: min((first(self, tokens, checked) or 0) + 1, len(tokens))
    )
    found = invariants.check_stops(letters)
    assert found.outcome == "FAIL" and "at the beginning of a line" in found.seen


def test_labels_that_can_not_be_told_apart_are_called_out(small: Model) -> None:
    found = invariants.check_stops(Broken(small.tokenizer, "letters"))
    assert found.outcome == "FAIL" and "the tokenizer drops line breaks" in found.seen and "tokens" in found.fix


def test_an_end_of_text_that_is_said_within_a_turn_is_called_out(small: Model) -> None:
    tokenizer = Broken(small.tokenizer, "none")
    tokenizer.eos_id = small.tokenizer.encode("it is")[1]
    found = invariants.check_stops(tokenizer)
    assert found.outcome == "FAIL" and "ends of turns" in found.seen


def test_checks_fail_where_the_numbers_do(monkeypatch: pytest.MonkeyPatch, small: Model) -> None:
    """Each check compares two programs; where one of them is off, it says so."""
    rescored = invariants.completion_logprobs
    monkeypatch.setattr(
        invariants, "completion_logprobs", lambda *a, **k: [row + 1e-3 * len(a[2]) for row in rescored(*a, **k)]
    )
    for check in (invariants.check_logprobs, invariants.check_ratio):
        found = check(small)
        assert found.outcome == "FAIL" and "(at most 1e-04)" in found.seen and "float32" in found.fix
    cached = invariants._cached_logits
    monkeypatch.setattr(invariants, "_cached_logits", lambda *a: cached(*a) + 0.1)
    assert invariants.check_cache(small).outcome == "FAIL"


def test_numbers_that_are_none_fail_every_check(monkeypatch: pytest.MonkeyPatch, small: Model) -> None:
    """Python's `max` passes over a NaN that doesn't come first."""
    rescored, cached, gradients = invariants.completion_logprobs, invariants._cached_logits, invariants._gradients
    monkeypatch.setattr(invariants, "_cached_logits", lambda *a: cached(*a) * np.nan)
    assert invariants.check_cache(small).outcome == "FAIL"
    calls = list[int]()

    def last_is_nan(*arguments: object, **more: object) -> object:
        calls.append(1)
        found = list(rescored(*arguments, **more))  # type: ignore[arg-type]
        return [*found[:-1], found[-1] * np.nan]

    monkeypatch.setattr(invariants, "completion_logprobs", last_is_nan)
    for check in (invariants.check_logprobs, invariants.check_ratio):
        assert check(small).outcome == "FAIL"
    assert calls
    monkeypatch.setattr(
        invariants, "_gradients", lambda *a: jax.tree.map(lambda leaf: leaf * np.float32(np.nan), gradients(*a))
    )
    assert invariants.check_devices(small, jax.devices()[:2]).outcome == "FAIL"


def test_devices_that_compute_otherwise_are_called_out(monkeypatch: pytest.MonkeyPatch, small: Model) -> None:
    gradients, calls = invariants._gradients, list[int]()

    def off(*arguments: object) -> object:
        calls.append(1)
        grads, loss = gradients(*arguments)
        return grads, loss * (1.0 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(invariants, "_gradients", off)
    found = invariants.check_devices(small, jax.devices())
    assert found.outcome == "FAIL" and "largest difference of loss and gradients" in found.seen


def test_a_check_that_breaks_off_is_said_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Model) -> invariants.Check:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 28 GiB")

    monkeypatch.setitem(invariants.CHECKS, 7, full)
    monkeypatch.setattr(doctor, "_devices", lambda *_: invariants.Check("5", "skipped", "not here"))
    code, out, err = command(capsys, "doctor", "--model", "microworld:small")
    assert code == 1 and "Traceback" not in out + err
    assert "FAIL    7: RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 28 GiB" in out
    assert "doesn't fit on one device" in out and "pass    16 " in out
    assert out.endswith("1 failed, 1 skipped\n")


def test_a_model_that_is_not_there_fails_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = command(capsys, "doctor", "--model", tmp_path / "none")
    assert code == 1 and "FAIL    model: " in out and "-> give --model" in out
    with pytest.raises(InputError):
        load_model(str(tmp_path / "none"), one_device(), "float32")
