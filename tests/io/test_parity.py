"""Logits and scores equal those of transformers: against stored files, and live where torch is installed."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.nn import log_softmax
from safetensors.numpy import load_file

from almost_jax.core.heads import sequence_scores
from almost_jax.core.llama import LlamaConfig, hidden_states, logits
from almost_jax.core.rotary import RopeConfig
from almost_jax.io.huggingface import load_llama, save_llama

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "__pycache__")


@functools.partial(jax.jit, static_argnames="config")
def all_logits(params, tokens, config):
    return logits(params, config, hidden_states(params, config, tokens))


@functools.partial(jax.jit, static_argnames="config")
def all_scores(params, tokens, lengths, config):
    return sequence_scores(params, config, tokens, lengths)


def ours(config: LlamaConfig, params, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits [B, T, V], or a reward model's scores [B]."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    if "score" in params:
        return np.asarray(all_scores(params, tokens, lengths, config))
    return np.asarray(all_logits(params, tokens, config))


def check_close(found: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4):
    assert found.shape == theirs.shape and found.dtype == theirs.dtype == np.float32
    assert np.abs(found - theirs).max() < tolerance
    if found.ndim == 3:
        assert np.abs(np.asarray(log_softmax(found)) - np.asarray(log_softmax(theirs))).max() < tolerance


def expected(name: str):
    stored = load_file(GOLDEN / name / "expected.safetensors")
    return stored["tokens"], stored["lengths"], stored["scores" if "scores" in stored else "logits"]


@pytest.mark.parametrize("name", VARIANTS)
def test_01_results_equal_the_stored_ones_of_transformers(name: str):
    tokens, lengths, theirs = expected(name)
    config, params = load_llama(GOLDEN / name)
    assert theirs.std() > 0.3
    check_close(ours(config, params, tokens, lengths), theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_02_stored_folders_go_out_with_the_same_bytes(tmp_path: Path, name: str):
    config, params = load_llama(GOLDEN / name)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    save_llama(tmp_path, config, params, dtype)
    check_tensors(tmp_path, GOLDEN / name)
    again, back = load_llama(tmp_path)
    assert again == config and jax.tree.structure(back) == jax.tree.structure(params)


def check_tensors(found: Path, given: Path):
    """The same tensors in both folders, byte by byte, however they are spread over files."""
    mine, theirs = all_tensors(found), all_tensors(given)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert mine[name].tobytes() == tensor.tobytes(), name


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


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
        ("old_linear", {"rope": RopeConfig(77.7)}),
        ("old_linear", {"rms_norm_eps": 1e-6}),
        ("old_llama3", {"rope": RopeConfig(99.0)}),
        ("old_theta", {"rope": RopeConfig()}),
        ("top_theta", {"rope": RopeConfig(10000.0, "linear", 3.0)}),
        ("padded", {"rms_norm_eps": 1e-6}),
        ("mistral", {"rope": RopeConfig()}),
        ("window", {"rope": RopeConfig()}),
        ("old_reward", {"rope": RopeConfig(222.0)}),
    ],
)
def test_01_the_stored_logits_would_show_a_lost_setting(name: str, change: dict):
    tokens, lengths, theirs = expected(name)
    config, params = load_llama(GOLDEN / name)
    changed = ours(dataclasses.replace(config, **change), params, tokens, lengths)
    assert np.abs(changed - theirs).max() > 1e-2


def golden_maker():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up.
    sys.modules["make_golden"] = module
    spec.loader.exec_module(module)
    return module


def check_live(maker, variant, seed: int, folder: Path):
    """transformers' results for a folder are ours, and those for what we export of it are the same again."""
    maker.make_folder(variant, seed, folder / "theirs")
    tokens, lengths = maker.make_tokens(seed)
    theirs = maker.run_model(maker.load_folder(folder / "theirs", variant.reward), tokens)
    config, params = load_llama(folder / "theirs")
    found = ours(config, params, tokens, lengths)
    check_close(found, theirs)
    save_llama(folder / "ours", config, params, variant.dtype, extra={"pad_token_id": 0})
    check_tensors(folder / "ours", folder / "theirs")
    model = maker.load_folder(folder / "ours", variant.reward)
    assert type(model).__name__ == ("LlamaForSequenceClassification" if variant.reward else "LlamaForCausalLM")
    back = maker.run_model(model, tokens)
    check_close(back, theirs, 1e-5)
    check_close(found, back)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_01_02_results_equal_transformers_live_there_and_back(tmp_path: Path, name: str):
    maker = golden_maker()
    assert set(maker.VARIANTS) == set(VARIANTS)
    check_live(maker, maker.VARIANTS[name], 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_01_02_random_variants_equal_transformers_live_there_and_back(tmp_path: Path, seed: int):
    maker = golden_maker()
    check_live(maker, maker.draw_variant(seed), seed, tmp_path)
