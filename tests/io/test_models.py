"""Models: folders of ours and of Hugging Face, onto meshes and back; what is missing or damaged is named."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, abstract_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.rotary import RopeConfig
from almost_jax.errors import InputError
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import Model, load_model, save_model
from almost_jax.io.tokenizer import Tokenizer, load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-3,
    rope=RopeConfig(1234.0, "llama3", 3.0, 1.5, 5.0, 61),
)


def make_tokenizer(words: int) -> Tokenizer:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, words)}}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))


def make_model(kind: str = "policy", words: int = 20, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract_params(CONFIG))
    if kind == "reward":
        head = jnp.asarray(rng.normal(size=(16,)), jnp.float32)
        return Model(CONFIG, {**params, "score": {"kernel": head}}, make_tokenizer(words), "reward", "here", -0.3, 2.7)
    return Model(CONFIG, params, make_tokenizer(words), "policy", "here")


def mesh(**sizes):
    wanted = MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes})
    return make_mesh(wanted, jax.devices()[: math.prod(sizes.values())])


def same_bytes(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_14_a_model_comes_back_with_its_normalisation(tmp_path: Path, kind: str):
    model = make_model(kind)
    save_model(tmp_path / "a" / "model", model)
    assert os.listdir(tmp_path / "a") == ["model"]
    found = load_model(str(tmp_path / "a" / "model"), mesh(), "float32")
    assert (found.kind, found.config) == (kind, CONFIG)
    assert (found.reward_mean, found.reward_std) == (model.reward_mean, model.reward_std)
    assert found.tokenizer.fingerprint == model.tokenizer.fingerprint
    same_bytes(found.params, model.params)
    save_model(tmp_path / "b", found)
    same_bytes(load_model(str(tmp_path / "b"), mesh(), "float32").params, model.params)


def test_parameters_lie_where_the_rules_say(tmp_path: Path):
    model = make_model("reward")
    save_model(tmp_path / "ours", model)
    save_llama(tmp_path / "theirs", CONFIG, model.params, "float32", model.tokenizer)
    for name in ("ours", "theirs"):
        found = load_model(str(tmp_path / name), mesh(data=2, fsdp=2, tensor=2), "float32")
        kernel = found.params["layers"]["mlp"]["gate"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert kernel.addressable_shards[0].data.shape == (2, 8, 20)
        assert found.params["score"]["kernel"].sharding.is_fully_replicated
        assert found.kind == "reward"
        same_bytes(found.params, model.params)


def test_the_compute_dtype_is_asked_for_and_parameters_stay_wide(tmp_path: Path):
    model = make_model()
    half = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half.params)
    save_model(tmp_path / "ours", half)
    save_llama(tmp_path / "theirs", CONFIG, model.params, "bfloat16", model.tokenizer)
    for name in ("ours", "theirs"):
        found = load_model(str(tmp_path / name), mesh(), "bfloat16")
        assert found.config == dataclasses.replace(CONFIG, dtype="bfloat16")
        same_bytes(found.params, wide)


def test_a_hugging_face_folder_carries_its_tokenizer(tmp_path: Path):
    model = make_model()
    save_llama(tmp_path, CONFIG, model.params, "float32", model.tokenizer)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["pad_token_id"], fields["eos_token_id"], fields["bos_token_id"]) == (0, 1, None)
    assert load_tokenizer(tmp_path).fingerprint == model.tokenizer.fingerprint
    found = load_model(str(tmp_path), mesh(), "float32")
    assert (found.kind, found.config) == ("policy", CONFIG)
    same_bytes(found.params, model.params)


def test_saving_again_replaces_and_a_killed_save_leaves_no_model(tmp_path: Path):
    path = tmp_path / "model"
    (tmp_path / ".model.saving" / "params").mkdir(parents=True)
    with pytest.raises(InputError, match="no such folder"):
        load_model(str(path), mesh(), "float32")
    for seed in (1, 2):
        model = make_model(seed=seed)
        save_model(path, model)
        same_bytes(load_model(str(path), mesh(), "float32").params, model.params)
    assert os.listdir(tmp_path) == ["model"]


def test_missing_and_damaged_models_are_named(tmp_path: Path):
    path = tmp_path / "model"

    def refused(source: str, said: str):
        with pytest.raises(InputError) as caught:
            load_model(source, mesh(), "float32")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        save_model(path, make_model("reward"))

    refused("microworld:huge", "model 'microworld:huge': the micro-world ships")
    refused("nowhere/at/all", "model 'nowhere/at/all': no such folder")
    refused(str(tmp_path), "has neither model.json")
    (path / "model.json").write_text("{")
    refused(str(path), "model.json: not a model of ours")
    card = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps({**card, "kind": "judge"}))
    refused(str(path), "kind 'judge'")
    (path / "model.json").write_text(json.dumps({**card, "kind": "policy"}))
    refused(str(path), "leaf score/kernel, float32 of shape (16,), is left over")
    wider = {**card["config"], "intermediate_size": 48}
    (path / "model.json").write_text(json.dumps({**card, "config": wider}))
    refused(str(path), "(2, 40, 16); expected float32 of shape (2, 48, 16)")
    data = next((path / "params").rglob("d/*"))
    os.truncate(data, data.stat().st_size // 2)
    refused(str(path), "is damaged (")
    (path / "tokenizer.json").unlink()
    refused(str(path), "no tokenizer found")
    make_tokenizer(21).save(path)
    refused(str(path), "isn't the one that the model was saved with")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path):
    for words in (24, 25):
        model = make_model(words=words)
        save_llama(tmp_path, CONFIG, model.params, "float32", model.tokenizer)
        if words == 24:
            load_model(str(tmp_path), mesh(), "float32")
        else:
            with pytest.raises(InputError, match="tokenizer has 25 tokens, but its vocabulary has room for 24"):
                load_model(str(tmp_path), mesh(), "float32")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, float("nan")), (float("inf"), 1.0), (0.0, -1.0)])
def test_14_a_normalisation_that_cannot_be_is_refused(tmp_path: Path, mean: float, std: float):
    model = dataclasses.replace(make_model("reward"), reward_mean=mean, reward_std=std)
    with pytest.raises(InputError, match="expected finite numbers, std positive"):
        save_model(tmp_path / "model", model)
    assert os.listdir(tmp_path) == []


HOST = """
import json, sys
import jax
from almost_jax.io.distributed import initialize
initialize()
from almost_jax.config import MeshConfig
from almost_jax.core.partitioning import make_mesh
from almost_jax.io.huggingface import SafetensorsSource
from almost_jax.io.models import read_model
read = SafetensorsSource.read
parts = {}
def watched(self, name, index):
    part = read(self, name, index)
    parts[name] = parts.get(name, 0) + part.size
    return part
SafetensorsSource.read = watched
model = read_model(sys.argv[1], make_mesh(MeshConfig(data=1, fsdp=2, tensor=1)), None)
print(json.dumps([jax.process_count(), jax.local_device_count(), parts]))
"""


@pytest.mark.slow
def test_each_of_two_hosts_reads_only_its_half(tmp_path: Path):
    model = make_model()
    save_llama(tmp_path, CONFIG, model.params, "float32", model.tokenizer)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"ALMOST_COORDINATOR": f"localhost:{port}", "ALMOST_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(tmp_path)],
            env={**os.environ, **place, "ALMOST_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [json.loads(host.communicate(timeout=300)[0].splitlines()[-1]) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    sizes = {name: tensor.size for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    for processes, devices, parts in said:
        assert (processes, devices) == (2, 1) and parts.keys() == sizes.keys()
        for name, size in sizes.items():
            # Norms are whole everywhere; of matrices a host reads the half that its device holds, and nothing else.
            assert parts[name] == (size if "norm" in name else size // 2), name
