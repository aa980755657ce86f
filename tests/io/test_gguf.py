"""GGUF files: the same model as the Hugging Face folder they were made from, and the same tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from almost_jax.config import MeshConfig
from almost_jax.core.llama import LlamaConfig, abstract_params
from almost_jax.core.partitioning import make_mesh
from almost_jax.core.rotary import RopeConfig, rope_frequencies
from almost_jax.errors import InputError
from almost_jax.io.gguf import load_gguf_tokenizer, open_gguf
from almost_jax.io.models import load_model
from almost_jax.io.weights import model_leaves, read_params, theirs

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-3,
    rope=RopeConfig(theta=1234.5),
    max_position_embeddings=111,
)
LLAMA_CPP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = ["Hello, WORLD! It's 1234 o'clock\n\n  and more…", " x", "naïve Ω 3.14 'll", "the theme\tof\r\nthem all"]


def random_params(config: LlamaConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(config))


def llama_cpp_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    # As llama.cpp's converter writes it.
    shape = (heads, 2, matrix.shape[0] // heads // 2, matrix.shape[1])
    return matrix.reshape(shape).swapaxes(1, 2).reshape(matrix.shape)


def write(
    path: Path,
    config: LlamaConfig,
    params,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    drop: str = "",
    rope_factors: np.ndarray | None = None,
    arch: str = "llama",
    feed_forward: int | None = None,
) -> dict[str, np.ndarray]:
    """Write a GGUF file; what its tensors stand for, in transformers' names and order."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(feed_forward or config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    meant = {}
    for leaf in model_leaves(config, False):
        for layer in range(config.num_layers if leaf.layered else 1):
            array = params
            for key in leaf.path:
                array = array[key]
            name = leaf.tensor(layer)
            matrix = np.ascontiguousarray(theirs(leaf, array[layer] if leaf.layered else array))
            heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name.split("_proj")[0][-1])
            stem = name.removesuffix(".weight").removeprefix(f"model.layers.{layer}.")
            ggml = LLAMA_CPP[stem] if not leaf.layered else f"blk.{layer}.{LLAMA_CPP[stem]}"
            used = kind if matrix.ndim == 2 else gguf.GGMLQuantizationType.F32
            order = llama_cpp_order(matrix, heads) if "self_attn" in name and heads else matrix
            packed = gguf.quants.quantize(order, used)
            wide = gguf.quants.dequantize(packed, used)
            if "self_attn" in name and heads:
                half = config.head_dim // 2
                wide = wide.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(matrix.shape)
            meant[name] = wide
            if drop not in (ggml, stem):
                writer.add_tensor(f"{ggml}.weight", packed, raw_dtype=used)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_0"])
def test_02_a_gguf_file_is_the_model_it_was_made_from(tmp_path: Path, kind: str):
    params = random_params(CONFIG)
    meant = write(tmp_path / "m.gguf", CONFIG, params, gguf.GGMLQuantizationType[kind])
    config, source = open_gguf(tmp_path / "m.gguf")
    assert config == CONFIG
    back = read_params(config, False, source, None, None)
    for leaf in model_leaves(config, False):
        found = back
        for key in leaf.path:
            found = found[key]
        for layer in range(config.num_layers if leaf.layered else 1):
            row = theirs(leaf, found[layer] if leaf.layered else found)
            np.testing.assert_array_equal(row, meant[leaf.tensor(layer)], err_msg=leaf.tensor(layer))
    if kind == "F32":
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_part_of_a_tensor_is_that_part_of_the_whole(tmp_path: Path):
    write(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), gguf.GGMLQuantizationType.Q8_0)
    _, source = open_gguf(tmp_path / "m.gguf")
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        rows, columns = source.describe(name)[0]
        whole = source.read(name, (slice(0, rows), slice(0, columns)))
        part = source.read(name, (slice(16, 32), slice(5, 9)))
        np.testing.assert_array_equal(part, whole[16:32, 5:9])


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"tie_embeddings": True}, {}),
        ({"rope": RopeConfig(77.5, "linear", 2.5)}, {"llama.rope.scaling.type": "linear"}),
        ({"rope": RopeConfig(77.5, "linear", 2.5)}, {}),
        ({"rope": RopeConfig(5000.0, "llama3", 8.0, 1.0, 4.0, 8192)}, {}),
        (
            {"rope": RopeConfig(5000.0, "llama3", 32.0, 1.0, 4.0, 96)},
            {"llama.rope.scaling.original_context_length": 96},
        ),
        ({"num_kv_heads": 4, "head_dim": 8}, {}),
    ],
    ids=["tied", "linear", "old linear", "llama3", "llama3.2", "mha"],
)
def test_shapes_and_rope_of_a_gguf_file(tmp_path: Path, change: dict, fields: dict):
    config = dataclasses.replace(CONFIG, **change)
    factors = None
    if config.rope.kind == "linear":
        fields = {**fields, "llama.rope.scaling.factor": 2.5}
    if config.rope.kind == "llama3":
        plain = rope_frequencies(RopeConfig(config.rope.theta), config.head_dim)
        factors = np.asarray(plain / rope_frequencies(config.rope, config.head_dim), np.float32)
    params = random_params(config)
    write(tmp_path / "m.gguf", config, params, fields=fields, rope_factors=factors)
    found, source = open_gguf(tmp_path / "m.gguf")
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read_params(found, False, source, None, None), params)


@pytest.mark.parametrize(
    ("fields", "more", "said"),
    [
        ({}, {"arch": "qwen2"}, "general.architecture 'qwen2'"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count 8"),
        ({"llama.attention.sliding_window": 4096}, {}, "llama.attention.sliding_window 4096"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "rope scaling 'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, {}, "llama.rope.scaling.factor is None"),
        ({}, {"rope_factors": np.arange(1, 9, dtype=np.float32)}, "rope_freqs.weight isn't LLaMA 3's scaling"),
        ({}, {"drop": "token_embd"}, "tensor token_embd.weight is missing"),
        ({}, {"drop": "blk.1.ffn_up"}, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        ({}, {"feed_forward": 96}, "mlp.gate_proj.weight has shape (64, 32), but the config says (96, 32)"),
    ],
)
def test_what_cannot_be_run_faithfully_is_refused_by_name(tmp_path: Path, fields: dict, more: dict, said: str):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, random_params(CONFIG), fields=fields, **more)
    with pytest.raises(InputError) as caught:
        found, source = open_gguf(path)
        read_params(found, False, source, None, None)
    assert said in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_cut_or_foreign_file_is_named(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write(path, CONFIG, random_params(CONFIG))
    data = path.read_bytes()
    for size in (0, 3, 30, 700, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="can't be read as GGUF"):
            open_gguf(path)
    path.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(InputError, match="can't be read as GGUF: .*magic"):
        open_gguf(path)


def byte_level(words) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|unk|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "the them theme 12 123 it's the theme of them"] * 3, trainer)
    return backend


def byte_level_fields(backend: Backend, pre: str) -> dict[str, Any]:
    import json

    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


WORDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("pre", WORDS)
def test_a_byte_level_tokenizer_encodes_as_the_one_it_was_made_from(tmp_path: Path, pre: str):
    backend = byte_level(WORDS[pre])
    write(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), fields=byte_level_fields(backend, pre))
    found = load_gguf_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        assert found.encode(text) == backend.encode(text).ids
        assert found.decode(found.encode(text)) == text.strip()
    assert (found.bos_id, found.eos_id, found.pad_id, found.vocab_size) == (1, 2, 2, backend.get_vocab_size())
    # A special token's name in a text is letters; between special tokens it is decoded to nothing.
    assert 2 not in found.encode("a<|end|>") and found.decode([1, *found.encode("a"), 2]) == "a"


def test_llama3_cuts_numbers_in_threes_and_keeps_whole_words(tmp_path: Path):
    fields = byte_level_fields(byte_level(WORDS["gpt-2"]), "llama-bpe")
    tokens = [*fields["tokenizer.ggml.tokens"][:-1], "123"]
    merges = [merge for merge in fields["tokenizer.ggml.merges"] if merge.replace(" ", "") in tokens]
    assert "123" not in [merge.replace(" ", "") for merge in merges]
    fields.update({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges})
    write(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), fields=fields)
    found = load_gguf_tokenizer(tmp_path / "m.gguf")
    three, four = len(tokens) - 1, tokens.index("4")
    assert found.encode("1234") == [three, four]
    # LLaMA 3's files begin a text without saying so.
    assert found._backend.encode("4") == [1, four]


def test_sentencepiece_merges_by_score(tmp_path: Path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    # "▁the" before "he": the best score wins, not the longest piece or the first pair.
    words = ["▁t", "he", "▁the", "th", "▁", "t", "h", "e", "m", "▁them"]
    tokens = pieces + words
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(words)
    scores = [0.0] * len(pieces) + [-1.0, -0.5, -2.0, -0.1, *[-9.0] * 5, -3.0]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), fields=fields)
    found = load_gguf_tokenizer(tmp_path / "m.gguf")

    def encoded(text: str) -> list[str]:
        return [tokens[token] for token in found.encode(text)]

    assert encoded("them") == ["▁", "th", "e", "m"]
    assert encoded("he t") == ["▁", "he", "▁t"]
    assert encoded("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert found.decode(found.encode("them é he")) == "them é he"
    assert found._backend.encode("m")[0] == 1
    model = load_model(
        str(tmp_path / "m.gguf"), make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1]), "float32"
    )
    assert model.tokenizer.fingerprint == found.fingerprint and model.config == CONFIG


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre None"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "tokenizer.ggml.merges don't fit"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 of tokenizer.ggml.token_type for"),
        ({"tokenizer.ggml.eos_token_id": None}, "no eos_token"),
        ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id is 999"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores: missing"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path: Path, change: dict, said: str):
    fields = {**byte_level_fields(byte_level(WORDS["gpt-2"]), "gpt-2"), **change}
    fields = {key: value for key, value in fields.items() if value is not None}
    write(tmp_path / "m.gguf", CONFIG, random_params(CONFIG), fields=fields)
    with pytest.raises(InputError) as caught:
        load_gguf_tokenizer(tmp_path / "m.gguf")
    assert said in str(caught.value) and str(tmp_path / "m.gguf") in str(caught.value)
