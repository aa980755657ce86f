"""LLaMA to and from Hugging Face folders: config.json and model.safetensors, in transformers' own names.

Their linear layers hold [out, in]; ours hold the axes that the model contracts, so a matrix is transposed and its head
axes are split or joined. Nothing else changes: export and import give back the same bytes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from almost_jax.core.heads import HEAD
from almost_jax.core.llama import LlamaConfig, Params, RopeConfig
from almost_jax.errors import InputError
from almost_jax.io.records import write_bytes
from almost_jax.io.tokenizer import Tokenizer

CAUSAL, CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"
DTYPES = ("float32", "bfloat16", "float16")

# What config.json may leave out, and what transformers' LlamaConfig then takes.
DEFAULT_THETA, DEFAULT_EPS, DEFAULT_POSITIONS, DEFAULT_INIT = 10000.0, 1e-6, 2048, 0.02
# Features that change the result and that our model lacks, with the values that mean "off".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "hidden_act": ("silu", "swish", None),
}


def parse_config(fields: dict[str, Any], where: str) -> LlamaConfig:
    """Our config from the fields of a config.json; what LLaMA files may leave out is filled as transformers does.

    Args:
        fields: the file's content. Rotary embeddings may stand in `rope_parameters` or in `rope_theta`, `rope_scaling`.
        where: the file, for messages.

    Raises:
        InputError: a required field is missing or no number, or the file asks for what can't be run faithfully.
    """
    model_type, classes = fields.get("model_type"), fields.get("architectures") or [CAUSAL]
    if model_type != "llama":
        raise InputError(f"{where}: model_type {model_type!r} isn't supported; expected 'llama'")
    if len(classes) != 1 or classes[0] not in (CAUSAL, CLASSIFIER):
        raise InputError(f"{where}: architectures {classes} isn't supported; expected ['{CAUSAL}'] or ['{CLASSIFIER}']")
    for key, off in UNSUPPORTED.items():
        if fields.get(key) not in off:
            raise InputError(f"{where}: {key} {fields[key]!r} isn't supported; expected {off[0]!r}")
    hidden, heads = _integer(fields, "hidden_size", where), _integer(fields, "num_attention_heads", where)
    try:
        return LlamaConfig(
            vocab_size=_integer(fields, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_integer(fields, "intermediate_size", where),
            num_layers=_integer(fields, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=_integer(fields, "num_key_value_heads", where, heads),
            head_dim=_integer(fields, "head_dim", where, hidden // heads),
            rms_norm_eps=_number(fields, "rms_norm_eps", where, DEFAULT_EPS),
            rope=_parse_rope(fields, where),
            tie_embeddings=_flag(fields, "tie_word_embeddings", where),
            max_position_embeddings=_integer(fields, "max_position_embeddings", where, DEFAULT_POSITIONS),
            initializer_range=_number(fields, "initializer_range", where, DEFAULT_INIT),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def render_config(config: LlamaConfig, dtype: str, reward: bool) -> dict[str, Any]:
    """The fields of a config.json that transformers reads as the same model, old releases (4.x) and new (5.x).

    Args:
        config: the model's shape.
        dtype: of the stored weights.
        reward: whether a scalar head stands beside the model.
    """
    rope = config.rope
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    fields: dict[str, Any] = {
        "architectures": [CLASSIFIER if reward else CAUSAL],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
    return {**fields, "num_labels": 1} if reward else fields


def load_llama(folder: Path) -> tuple[LlamaConfig, Params]:
    """Read a Hugging Face folder.

    Returns:
        The config, with stacked layers, and NumPy parameters in the stored dtype (a reward model's with its head).

    Raises:
        InputError: a file is missing or broken, a tensor is missing, left over or of another shape than config.json
            says, or the model isn't a LLaMA that can be run faithfully.
    """
    folder = Path(folder)
    fields = _read_json(folder / "config.json")
    config = parse_config(fields, str(folder / "config.json"))
    reward = (fields.get("architectures") or [CAUSAL]) == [CLASSIFIER]
    tensors = _Tensors(folder)
    if reward and "lm_head.weight" not in tensors.files and not config.tie_embeddings:
        # Sequence classifiers carry no output matrix; tied embeddings are the tree without one.
        config = dataclasses.replace(config, tie_embeddings=True)
    params = _to_tree(config, reward, tensors.take)
    if config.tie_embeddings:
        tensors.forget("lm_head.weight")
    tensors.expect_none_left()
    return config, params


def save_llama(
    folder: Path, config: LlamaConfig, params: Params, dtype: str, tokenizer: Tokenizer | None = None
) -> None:
    """Write config.json and model.safetensors, each atomically; a scalar head makes it a sequence classifier.

    Args:
        folder: made if missing; other files in it stay.
        config: of the parameters.
        params: stacked or unstacked layers, on any devices.
        dtype: of the stored weights: float32, bfloat16 or float16.
        tokenizer: when given, its files are written too, and its special ids stand in config.json.

    Raises:
        InputError: another dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} can't be exported; known: {', '.join(DTYPES)}")
    stored = jnp.dtype(dtype)
    tensors = {
        name: np.ascontiguousarray(np.asarray(tensor).astype(stored)) for name, tensor in _from_tree(config, params)
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    save_file(tensors, str(temporary), metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    fields = render_config(config, dtype, HEAD in params)
    if tokenizer is not None:
        tokenizer.save(folder)
        special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        fields.update({f"{name}_token_id": token for name, token in special.items()})
    write_bytes(folder / "config.json", (json.dumps(fields, indent=2) + "\n").encode())


def _layer_tensors(c: LlamaConfig) -> list[tuple[tuple[str, str], str, tuple[int, ...], int]]:
    """Per tensor of a layer: our path, their name, our shape, and how many of our first axes the model contracts."""
    d, f, n, k, h = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
    return [
        (("attention_norm", "scale"), "input_layernorm", (d,), 0),
        (("attention", "query"), "self_attn.q_proj", (d, n, h), 1),
        (("attention", "key"), "self_attn.k_proj", (d, k, h), 1),
        (("attention", "value"), "self_attn.v_proj", (d, k, h), 1),
        (("attention", "output"), "self_attn.o_proj", (n, h, d), 2),
        (("mlp_norm", "scale"), "post_attention_layernorm", (d,), 0),
        (("mlp", "gate"), "mlp.gate_proj", (d, f), 1),
        (("mlp", "up"), "mlp.up_proj", (d, f), 1),
        (("mlp", "down"), "mlp.down_proj", (f, d), 1),
    ]


def _outer_tensors(c: LlamaConfig, reward: bool) -> list[tuple[tuple[str, ...], str, tuple[int, ...], int]]:
    """The same for the tensors outside the layers; paths are whole."""
    d, v = c.hidden_size, c.vocab_size
    rows: list[tuple[tuple[str, ...], str, tuple[int, ...], int]] = [
        (("embedding",), "model.embed_tokens.weight", (v, d), 0),
        (("norm", "scale"), "model.norm.weight", (d,), 0),
    ]
    if not c.tie_embeddings:
        rows.append((("lm_head", "kernel"), "lm_head.weight", (d, v), 1))
    return [*rows, ((HEAD, "kernel"), "score.weight", (d,), 1)] if reward else rows


def _path(path: tuple[str, ...]) -> tuple[str, ...]:
    return path if path[-1] == "scale" else (*path, "kernel")


def _theirs(array: np.ndarray, contracted: int) -> np.ndarray:
    """Our axes [in..., out...] -> their [out, in]; embeddings and norm scales (contracted 0) stay."""
    if contracted == 0:
        return array
    return array.reshape(math.prod(array.shape[:contracted]), -1).T


def _ours(array: np.ndarray, shape: tuple[int, ...], contracted: int) -> np.ndarray:
    return array if contracted == 0 else np.ascontiguousarray(array.T).reshape(shape)


def _to_tree(config: LlamaConfig, reward: bool, take: Callable[[str, tuple[int, ...]], np.ndarray]) -> Params:
    tree: Params = {}

    def put(path: tuple[str, ...], value: np.ndarray) -> None:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value

    def read(name: str, shape: tuple[int, ...], contracted: int) -> np.ndarray:
        wanted = shape
        if contracted:
            wanted = (math.prod(shape[contracted:]), math.prod(shape[:contracted]))
        return _ours(take(name, wanted), shape, contracted)

    for path, name, shape, contracted in _outer_tensors(config, reward):
        put(path, read(name, shape, contracted))
    for path, name, shape, contracted in _layer_tensors(config):
        rows = [read(f"model.layers.{i}.{name}.weight", shape, contracted) for i in range(config.num_layers)]
        put(("layers", *_path(path)), np.stack(rows))
    return tree


def _from_tree(config: LlamaConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    def get(path: tuple[str, ...], tree: Any) -> Any:
        for key in path:
            tree = tree[key]
        return tree

    for path, name, _, contracted in _outer_tensors(config, HEAD in params):
        yield name, _theirs(np.asarray(jax.device_get(get(path, params))), contracted)
    for path, name, _, contracted in _layer_tensors(config):
        stacked = np.asarray(jax.device_get(get(_path(path), params["layers"]))) if "layers" in params else None
        for i in range(config.num_layers):
            row = get(_path(path), params[f"layers_{i}"]) if stacked is None else stacked[i]
            yield f"model.layers.{i}.{name}.weight", _theirs(np.asarray(jax.device_get(row)), contracted)


class _Tensors:
    """The tensors of a folder's safetensors files, each read once."""

    def __init__(self, folder: Path) -> None:
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            paths = [single]
        elif index.is_file():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise InputError(f"{index}: no weight_map; expected the index of a sharded model")
            paths = [folder / name for name in sorted(set(names.values()))]
        else:
            raise InputError(f"{folder}: no model.safetensors found; other weight files can't be read")
        self.folder = folder
        self.files: dict[str, Any] = {}
        for path in paths:
            try:
                file: Any = safe_open(str(path), framework="numpy")
                self.files.update(dict.fromkeys(file.keys(), file))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: can't be read as safetensors ({error})") from error

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.files:
            raise InputError(f"{self.folder}: tensor {name} is missing; config.json asks for one of shape {shape}")
        array: np.ndarray = self.files.pop(name).get_tensor(name)
        if array.shape != shape:
            raise InputError(f"{self.folder}: tensor {name} has shape {array.shape}, but config.json says {shape}")
        if array.dtype not in [jnp.dtype(dtype) for dtype in DTYPES]:
            raise InputError(f"{self.folder}: tensor {name} is {array.dtype}; expected one of {', '.join(DTYPES)}")
        return array

    def forget(self, name: str) -> None:
        self.files.pop(name, None)

    def expect_none_left(self) -> None:
        # Old exports stored the rotary frequencies; they follow from the config.
        left = sorted(name for name in self.files if not name.endswith("rotary_emb.inv_freq"))
        if left:
            raise InputError(f"{self.folder}: tensor {left[0]} has no place in a LLaMA ({len(left)} such in all)")


def _parse_rope(fields: dict[str, Any], where: str) -> RopeConfig:
    nested: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        given = fields.get(field) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise InputError(f"{where}: {field} {given!r} isn't supported; expected one set for all layers")
        nested.update(given)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"{where}: rope type {kind!r} can't be run faithfully; known: default, linear, llama3")
    if nested.get("partial_rotary_factor", 1.0) != 1.0:
        factor = nested["partial_rotary_factor"]
        raise InputError(f"{where}: partial_rotary_factor {factor!r} isn't supported; expected 1")
    theta = _number({**fields, **nested}, "rope_theta", where, DEFAULT_THETA)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = _number(nested, "factor", where)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=_number(nested, "low_freq_factor", where),
        high_freq_factor=_number(nested, "high_freq_factor", where),
        original_max_position_embeddings=_integer(
            {**nested, **fields}, "original_max_position_embeddings", where, fields.get("max_position_embeddings")
        ),
    )


def _integer(fields: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {key} is {value!r}; expected a positive integer")
    return value


def _number(fields: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{where}: {key} is {value!r}; expected a positive number")
    return float(value)


def _flag(fields: dict[str, Any], key: str, where: str) -> bool:
    value = fields.get(key)
    if value not in (None, True, False):
        raise InputError(f"{where}: {key} is {value!r}; expected true or false")
    return bool(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); expected a Hugging Face folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields
