"""Logits and scores equal those of transformers: against stored files, and live where torch is installed."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from almost_jax.core.heads import sequence_scores
from almost_jax.core.llama import LlamaConfig, RopeConfig, hidden_states, logits
from almost_jax.io.huggingface import load_llama, save_llama

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("mha", "gqa", "mqa", "tied", "linear", "llama3", "odd", "head_dim", "reward")


@functools.partial(jax.jit, static_argnames="config")
def all_logits(params, tokens, config):
    return logits(params, config, hidden_states(params, config, tokens))


@functools.partial(jax.jit, static_argnames="config")
def all_scores(params, tokens, lengths, config):
    return sequence_scores(params, config, tokens, lengths)


def ours(name: str, config: LlamaConfig, params, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    if name == "reward":
        return np.asarray(all_scores(params, tokens, lengths, config))
    return np.asarray(all_logits(params, tokens, config))


def expected(name: str):
    stored = load_file(GOLDEN / name / "expected.safetensors")
    return stored["tokens"], stored["lengths"], stored["scores" if name == "reward" else "logits"]


@pytest.mark.parametrize("name", VARIANTS)
def test_01_logits_equal_the_stored_ones_of_transformers(name: str):
    tokens, lengths, theirs = expected(name)
    config, params = load_llama(GOLDEN / name)
    found = ours(name, config, params, tokens, lengths)
    assert found.shape == theirs.shape and found.dtype == theirs.dtype == np.float32
    assert theirs.std() > 0.5
    assert np.abs(found - theirs).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("linear", {"rope": RopeConfig()}),
        ("llama3", {"rope": RopeConfig(theta=1234.0)}),
        ("llama3", {"rope": RopeConfig(1234.0, "linear", 4.0)}),
        ("odd", {"rope": RopeConfig()}),
        ("odd", {"rms_norm_eps": 1e-2}),
        ("head_dim", {"rope": RopeConfig()}),
        ("reward", {"rope": RopeConfig()}),
    ],
)
def test_01_the_stored_logits_would_show_a_lost_setting(name: str, change: dict):
    tokens, lengths, theirs = expected(name)
    config, params = load_llama(GOLDEN / name)
    changed = ours(name, dataclasses.replace(config, **change), params, tokens, lengths)
    assert np.abs(changed - theirs).max() > 1e-2


def golden_maker():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_01_logits_equal_transformers_live(tmp_path: Path, name: str):
    maker = golden_maker()
    assert set(maker.VARIANTS) == set(VARIANTS)
    model = maker.make_model(name, seed=5)
    tokens, lengths = maker.make_tokens(seed=6)
    model.save_pretrained(tmp_path)
    config, params = load_llama(tmp_path)
    assert np.abs(ours(name, config, params, tokens, lengths) - maker.run_model(model, tokens)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_02_an_exported_folder_loads_in_transformers_with_the_same_logits(tmp_path: Path, name: str):
    maker = golden_maker()
    import transformers

    config, params = load_llama(GOLDEN / name)
    save_llama(tmp_path, config, params, "float32")
    kind = transformers.AutoModelForSequenceClassification if name == "reward" else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == ("LlamaForSequenceClassification" if name == "reward" else "LlamaForCausalLM")
    tokens, lengths, theirs = expected(name)
    # Which id pads is the tokenizer's to say, and none is exported here.
    model.config.pad_token_id = 0
    found = maker.run_model(model.eval(), tokens)
    assert np.abs(found - theirs).max() < 1e-5
    assert np.abs(found - ours(name, config, params, tokens, lengths)).max() < 1e-4
