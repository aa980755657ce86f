"""Hugging Face folders: round trips, config.json's dialects, and what is refused."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from almost_jax.config import MeshConfig
from almost_jax.core.heads import add_head, head_axes
from almost_jax.core.llama import LlamaConfig, abstract_params, logical_axes, unstack_layers
from almost_jax.core.partitioning import make_mesh, shardings
from almost_jax.core.rotary import RopeConfig
from almost_jax.errors import InputError
from almost_jax.io.hf_config import parse_config, render_config
from almost_jax.io.huggingface import load_llama, open_llama, save_llama
from almost_jax.io.weights import common_dtype, read_params

BASE = LlamaConfig(
    vocab_size=37,
    hidden_size=20,
    intermediate_size=44,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=14,
    rms_norm_eps=1e-3,
    rope=RopeConfig(theta=1234.0),
    max_position_embeddings=111,
    initializer_range=0.3,
)
LINEAR = RopeConfig(theta=77.5, kind="linear", factor=2.5)
LLAMA3 = RopeConfig(1234.0, "llama3", 3.0, 1.5, 5.0, 61)
VARIANTS = {
    "gqa": BASE,
    "mha": dataclasses.replace(BASE, num_heads=2, head_dim=10),
    "mqa": dataclasses.replace(BASE, num_kv_heads=1),
    "tied": dataclasses.replace(BASE, tie_embeddings=True),
    "linear": dataclasses.replace(BASE, rope=LINEAR),
    "llama3": dataclasses.replace(BASE, rope=LLAMA3),
}
REQUIRED = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


@functools.cache
def shapes(config: LlamaConfig):
    return abstract_params(config)


def random_params(config: LlamaConfig, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes(config))


def same_bytes(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_02_export_then_import_gives_the_same_bytes(tmp_path: Path, name: str, dtype: str):
    config = VARIANTS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config, 3))
    save_llama(tmp_path, config, params, dtype)
    found, back = load_llama(tmp_path)
    assert found == config
    same_bytes(back, params)
    again = tmp_path / "again"
    save_llama(again, found, back, dtype)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"again", "config.json", "model.safetensors"}


def test_02_a_matrix_lands_where_transformers_looks_for_it(tmp_path: Path):
    params = random_params(BASE, 4)
    save_llama(tmp_path, BASE, params, "float32")
    theirs = load_file(tmp_path / "model.safetensors")
    attention = jax.tree.map(np.asarray, params["layers"]["attention"])
    # q_proj's row n*H+h, column d; o_proj's row d, column n*H+h.
    assert theirs["model.layers.2.self_attn.q_proj.weight"][3 * 14 + 5, 7] == attention["query"]["kernel"][2, 7, 3, 5]
    assert theirs["model.layers.1.self_attn.k_proj.weight"][1 * 14 + 13, 0] == attention["key"]["kernel"][1, 0, 1, 13]
    assert theirs["model.layers.0.self_attn.o_proj.weight"][6, 4 * 14 + 9] == attention["output"]["kernel"][0, 4, 9, 6]
    assert theirs["model.layers.2.mlp.down_proj.weight"][6, 40] == params["layers"]["mlp"]["down"]["kernel"][2, 40, 6]
    assert theirs["lm_head.weight"][36, 19] == params["lm_head"]["kernel"][19, 36]


def test_02_a_reward_model_keeps_its_head(tmp_path: Path):
    params = add_head(random_params(BASE, 5), BASE, jax.random.key(6), 0.5)
    save_llama(tmp_path, BASE, params, "float32")
    config, back = load_llama(tmp_path)
    assert config == BASE
    same_bytes(back, params)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["score.weight"].shape == (1, 20)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    # As transformers writes classifiers: without an output matrix.
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    config, back = load_llama(tmp_path)
    assert config.tie_embeddings
    same_bytes(back, {name: tree for name, tree in params.items() if name != "lm_head"})


def test_unstacked_layers_and_sharded_files_are_the_same_model(tmp_path: Path):
    params = random_params(BASE, 7)
    unrolled = dataclasses.replace(BASE, scan_layers=False)
    save_llama(tmp_path / "a", BASE, params, "float32")
    save_llama(tmp_path / "b", unrolled, unstack_layers(params, 3), "float32")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    tensors = load_file(tmp_path / "a/model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, tmp_path / "a" / file)
    (tmp_path / "a/model.safetensors").unlink()
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    same_bytes(load_llama(tmp_path / "a")[1], params)


def test_saving_in_another_dtype_rounds_once(tmp_path: Path):
    params = random_params(BASE, 8)
    save_llama(tmp_path, BASE, params, "bfloat16")
    same_bytes(load_llama(tmp_path)[1], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    with pytest.raises(InputError, match="int8"):
        save_llama(tmp_path, BASE, params, "int8")


def test_optional_fields_are_filled_as_transformers_does():
    for extra in ({}, {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "rope_parameters": None}):
        assert parse_config({**REQUIRED, **extra}, "config.json") == LlamaConfig(
            vocab_size=37,
            hidden_size=24,
            intermediate_size=44,
            num_layers=3,
            num_heads=6,
            num_kv_heads=6,
            head_dim=4,
            rms_norm_eps=1e-6,
            rope=RopeConfig(theta=10000.0),
            tie_embeddings=False,
            max_position_embeddings=2048,
            initializer_range=0.02,
        )


SCALED = {"factor": 3, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": 61}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 500000}, RopeConfig(theta=500000.0)),
        ({"rope_parameters": {"rope_theta": 1234.0, "rope_type": "default"}}, RopeConfig(theta=1234.0)),
        ({"rope_parameters": {"rope_theta": 1234.0}}, RopeConfig(theta=1234.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 77.5}, LINEAR),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, dataclasses.replace(LINEAR, theta=10000.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 77.5}}, LINEAR),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.5}, "rope_theta": 77.5}, LINEAR),
        # The old field, where it is set, replaces the new one as a whole.
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.5},
                "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
                "rope_theta": 77.5,
            },
            LINEAR,
        ),
        (
            {"rope_scaling": {"type": "llama3", **SCALED, "original_max_position_embeddings": None}},
            RopeConfig(10000.0, "llama3", 3.0, 1.5, 5.0, 2048),
        ),
        ({"rope_theta": 1234.0, "rope_scaling": {"rope_type": "llama3", **SCALED}}, LLAMA3),
        ({"rope_parameters": {"rope_theta": 1234, "rope_type": "llama3", **SCALED}}, LLAMA3),
        (
            {
                "rope_theta": 1234.0,
                "max_position_embeddings": 61,
                "rope_scaling": {"rope_type": "llama3", **SCALED, "original_max_position_embeddings": None},
            },
            LLAMA3,
        ),
    ],
)
def test_both_ways_to_write_rope_are_read(fields: dict, rope: RopeConfig):
    assert parse_config({**REQUIRED, **fields}, "config.json").rope == rope


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        (
            {"model_type": "mistral"},
            "sliding_window 4096 isn't supported: it hides what max_position_embeddings 131072",
        ),
        ({"model_type": "mixtral"}, "model_type 'mixtral' isn't supported (its feed-forward is a mixture of experts)"),
        ({"model_type": "qwen2"}, "(its attention has biases)"),
        ({"sliding_window": 2047}, "sliding_window 2047"),
        ({"sliding_window": True}, "sliding_window True"),
        ({"model_type": "mistral", "sliding_window": None}, "num_heads 6 must be a multiple of num_kv_heads 8"),
        ({"model_type": "mistral", "architectures": ["LlamaForCausalLM"]}, "['LlamaForCausalLM']"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"num_experts": 4}, "num_experts 4"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is None"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "37"}, "vocab_size is '37'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"rope_scaling": {"rope_type": "llama3", **SCALED, "low_freq_factor": 5}}, "low_freq_factor 5 isn't below"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"num_key_value_heads": 4}, "num_kv_heads 4"),
        ({"head_dim": 7}, "head_dim 7"),
    ],
)
def test_what_cannot_be_run_faithfully_is_refused_by_name(fields: dict, said: str):
    with pytest.raises(InputError) as caught:
        parse_config({**REQUIRED, **fields}, "folder/config.json")
    assert said in str(caught.value)
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)


def test_a_mistral_without_its_window_is_a_llama():
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    given = {"num_key_value_heads": 2, "max_position_embeddings": 99}
    assert parse_config({**REQUIRED, **given, **mistral}, "config.json") == parse_config({**REQUIRED, **given}, "x")


def test_a_window_that_hides_nothing_is_none():
    for window in (2048, 4096):
        assert parse_config({**REQUIRED, "sliding_window": window}, "x") == parse_config(REQUIRED, "x")


def test_a_tied_model_with_both_matrices_is_what_transformers_makes_of_it(tmp_path: Path):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    save_llama(tmp_path, BASE, random_params(BASE, 15), "float32")
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    config, params = load_llama(tmp_path)
    assert not config.tie_embeddings
    same_bytes(params, random_params(BASE, 15))
    edit(tmp_path, lambda tensors: tensors.update({head: tensors[embedding].copy()}))
    tied, params = load_llama(tmp_path)
    assert tied.tie_embeddings and "lm_head" not in params
    edit(tmp_path, lambda tensors: tensors.pop(embedding))
    same_bytes(load_llama(tmp_path)[1], params)


def test_parts_lie_on_their_devices_and_are_the_same_model(tmp_path: Path):
    config = dataclasses.replace(BASE, vocab_size=38, num_kv_heads=2, head_dim=6)
    params = add_head(random_params(config, 12), config, jax.random.key(1), 0.5)
    save_llama(tmp_path, config, params, "float16")
    found = open_llama(tmp_path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placement = shardings({**logical_axes(config), **head_axes()}, mesh)
    read: list[tuple[str, tuple]] = []

    class Watched:
        where = found.source.where
        names, describe = found.source.names, found.source.describe

        def read(self, name, index):
            read.append((name, index))
            return found.source.read(name, index)

    back = read_params(found.config, found.reward, Watched(), "float32", placement)
    same_bytes(back, jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), params))
    assert jax.tree.map(lambda leaf: leaf.sharding, back) == placement
    # Heads over tensor, the model's dimension over fsdp: only parts are read, each of them once.
    query = [index for name, index in read if name == "model.layers.1.self_attn.q_proj.weight"]
    halves = [(slice(0, 18), slice(18, 36)), (slice(0, 10), slice(10, 20))]
    assert sorted(query, key=str) == sorted(itertools.product(*halves), key=str)
    assert common_dtype(found.config, found.reward, found.source) == "float16"


def test_layers_in_different_dtypes_meet_in_the_widest(tmp_path: Path):
    params = random_params(BASE, 13)
    save_llama(tmp_path, BASE, params, "bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.float32)}))
    back = load_llama(tmp_path)[1]
    assert back["layers"]["mlp"]["up"]["kernel"].dtype == np.float32
    assert back["layers"]["mlp"]["down"]["kernel"].dtype == jnp.bfloat16
    found = open_llama(tmp_path)
    assert common_dtype(found.config, found.reward, found.source) == "float32"


def test_large_models_are_written_in_shards(tmp_path: Path):
    params = random_params(BASE, 14)
    save_llama(tmp_path, BASE, params, "float32", shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = {file: sum(tensor.nbytes for tensor in load_file(tmp_path / file).values()) for file in files}
    assert max(sizes.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert sum(sizes.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    same_bytes(load_llama(tmp_path)[1], params)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
def test_a_rendered_config_reads_back_in_old_and_new_dialect(config: LlamaConfig):
    fields = render_config(config, "float32", False)
    new = {key: value for key, value in fields.items() if key not in ("rope_theta", "rope_scaling")}
    old = {key: value for key, value in fields.items() if key != "rope_parameters"}
    for dialect in (fields, new, old):
        assert parse_config(json.loads(json.dumps(dialect)), "config.json") == config


def edit(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_broken_folders_are_named(tmp_path: Path):
    params = random_params(BASE, 9)

    def refused(said: str):
        with pytest.raises(InputError) as caught:
            load_llama(tmp_path)
        assert said in str(caught.value) and str(tmp_path) in str(caught.value)
        save_llama(tmp_path, BASE, params, "float32")

    refused("config.json: can't be read")
    (tmp_path / "config.json").write_text("{")
    refused("not JSON")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused("pytorch_model.bin: a pickle can run any code")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").unlink()
    refused("no model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for shard, said in (("a.safetensors", "a.safetensors: missing"), ("../a", "'../a' isn't a file's name")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        refused(said)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("can't be read as safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.pop(name))
    refused(f"tensor {name} is missing; the config asks for one of shape (44, 20)")
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    refused(f"tensor {name} has shape (20, 44), but the config says (44, 20)")
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    refused(f"tensor {name} is I8")
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit(tmp_path, lambda tensors: tensors.update({bias: np.zeros((84,), np.float32)}))
    refused(f"tensor {bias} has no place in a LLaMA")
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    refused("tensor lm_head.weight is missing")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda tensors: tensors.update({old: np.zeros((7,), np.float32)}))
    same_bytes(load_llama(tmp_path)[1], params)
