"""GGUF files: a LLaMA in llama.cpp's format, its quantised tensors as the numbers they stand for.

llama.cpp rotates pairs of neighbours where transformers rotates the two halves of a head, so its files hold the rows of
the query and key projections in another order; it is undone here. LLaMA 3's rope scaling is stored as a factor for
every frequency; it is recognised by them, or refused.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from almost_jax.core.llama import LlamaConfig
from almost_jax.core.rotary import RopeConfig, rope_frequencies
from almost_jax.errors import InputError
from almost_jax.io.gguf_tokenizer import build_tokenizer
from almost_jax.io.tokenizer import Tokenizer

GGUF = ".gguf"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# What makes a file of architecture llama another model than ours, with the values that mean "off".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "llama.expert_count": (None, 0),
    "llama.attention.sliding_window": (None, 0),
    "llama.attention.causal": (None, True),
    "llama.rope.scaling.attn_factor": (None, 1.0),
    "llama.logit_scale": (None, 1.0),
    "llama.embedding_scale": (None, 1.0),
    "llama.residual_scale": (None, 1.0),
    "llama.attention.scale": (None, 0.0),
}


class GGUFSource:
    """The tensors of a GGUF file in transformers' names and order, dequantised to float32 as they are read."""

    def __init__(self, path: Path, reader: Any, heads: dict[str, int]) -> None:
        """Take the places of the tensors.

        Args:
            path: of the file.
            reader: gguf's, open on it.
            heads: of the tensors whose rows llama.cpp reordered, by the ends of their names.
        """
        self.where = str(path)
        self._path, self._heads = path, heads
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            if tensor.name != _ROPE_FACTORS:
                # The file is mapped anew for each tensor: what is mapped counts as used memory until it is closed.
                self._tensors[_their_name(tensor.name)] = (
                    tuple(int(size) for size in reversed(tensor.shape)),
                    tensor.tensor_type,
                    int(tensor.data_offset),
                    tensor.data.dtype,
                    tensor.data.shape,
                )

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._tensors

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape, and float32, which is what it is read as."""
        return self._tensors[name][0], "float32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; only its rows are dequantised.

        Raises:
            InputError: the tensor is of a type that gguf can't dequantise.
        """
        from gguf.quants import dequantize

        _, kind, offset, dtype, shape = self._tensors[name]
        mapped = np.memmap(self._path, dtype, mode="r", offset=offset, shape=shape)
        try:
            rows: np.ndarray = dequantize(np.ascontiguousarray(mapped[index[0]]), kind)
        except (NotImplementedError, KeyError, ValueError) as error:
            raise InputError(f"{self._path}: tensor {name} is {kind.name}, which can't be dequantised") from error
        heads = next((count for end, count in self._heads.items() if name.endswith(end)), None)
        if heads is not None:
            rows = _unpermute(rows, self._tensors[name][0][0] // heads)
        part: np.ndarray = rows[(slice(None), *index[1:])].astype(np.float32)
        return part


def open_gguf(path: Path) -> tuple[LlamaConfig, GGUFSource]:
    """Read a file's config and where its tensors are.

    Raises:
        InputError: the file is cut or foreign, or the model isn't a LLaMA that can be run faithfully.
    """
    reader = _open(path)
    fields = _Fields(path, reader)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: general.architecture {architecture!r} isn't supported; expected 'llama'")
    for key, off in _UNSUPPORTED.items():
        if fields.get(key) not in off:
            raise InputError(f"{path}: {key} {fields.get(key)!r} isn't supported; expected {off[-1]!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: tensor token_embd.weight is missing; expected a language model's weights")
    hidden, heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    kv_heads = fields.integer("llama.attention.head_count_kv", heads)
    head_dim = fields.integer("llama.attention.key_length", hidden // heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if fields.integer(key, head_dim) != head_dim:
            raise InputError(f"{path}: {key} {fields.get(key)} isn't supported; expected the head size, {head_dim}")
    positions = fields.integer("llama.context_length")
    try:
        config = LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[-1]),
            hidden_size=hidden,
            intermediate_size=fields.integer("llama.feed_forward_length"),
            num_layers=fields.integer("llama.block_count"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
            rope=_rope(fields, tensors.get(_ROPE_FACTORS), head_dim),
            tie_embeddings="output.weight" not in tensors,
            max_position_embeddings=positions,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return config, GGUFSource(path, reader, {"q_proj.weight": heads, "k_proj.weight": kv_heads})


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a file's metadata describe.

    Raises:
        InputError: it is of a kind that can't be rebuilt faithfully, or the metadata are incomplete.
    """
    fields = _Fields(path, _open(path))
    return build_tokenizer(fields.get, str(path))


class _Fields:
    """A file's metadata by name."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path, self._reader = path, reader

    def get(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise InputError(f"{self.path}: {key} can't be read ({error})") from error

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{self.path}: {key} is {value!r}; expected a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{self.path}: {key} is {value!r}; expected a positive number")
        # Stored in float32: the shortest decimal that means the same is what the model's config.json said.
        return float(str(np.float32(value)))


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(str(path), "r")
    # A cut or foreign file shows as whatever its first impossible number leads to.
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: can't be read as GGUF: it is cut, or something else ({line})") from error


def _their_name(name: str) -> str:
    """llama.cpp's name of a tensor in transformers' words; an unknown one stays, and is refused by name later."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
    if found is None or found[2] not in _NAMES:
        return name
    layer = "" if found[1] is None else f"model.layers.{found[1]}."
    return f"{layer}{_NAMES[found[2]]}.{found[3]}"


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [heads * H, D] from llama.cpp's order of a head's dimensions (0, H/2, 1, ...) back to 0, 1, ..."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _rope(fields: _Fields, factors: Any, head_dim: int) -> RopeConfig:
    theta = fields.number("llama.rope.freq_base", 10000.0)
    kind = fields.get("llama.rope.scaling.type") or "none"
    factor = fields.get("llama.rope.scaling.factor")
    if kind not in ("none", "linear"):
        raise InputError(f"{fields.path}: rope scaling {kind!r} can't be run faithfully; known: none, linear")
    if factors is not None:
        if kind != "none":
            raise InputError(f"{fields.path}: {kind} rope scaling beside {_ROPE_FACTORS} can't be run faithfully")
        return _llama3_rope(fields, np.asarray(factors.data, np.float64).reshape(-1), theta, head_dim)
    # Before types were written, a factor alone meant linear scaling.
    if factor is None:
        factor = fields.get("llama.rope.scale_linear")
    if kind == "linear" or factor not in (None, 1.0):
        if not isinstance(factor, int | float) or not factor > 0:
            raise InputError(f"{fields.path}: llama.rope.scaling.factor is {factor!r}; expected a positive number")
        return RopeConfig(theta=theta, kind="linear", factor=float(str(np.float32(factor))))
    return RopeConfig(theta=theta)


def _llama3_rope(fields: _Fields, factors: np.ndarray, theta: float, head_dim: int) -> RopeConfig:
    """The scaling whose factors these are: LLaMA 3.1's and later, which differ in the largest factor only."""
    original = fields.integer("llama.rope.scaling.original_context_length", 8192)
    rope = RopeConfig(theta, "llama3", float(str(np.float32(factors.max()))), 1.0, 4.0, original)
    plain = np.asarray(rope_frequencies(RopeConfig(theta=theta), head_dim), np.float64)
    ours = plain / np.asarray(rope_frequencies(rope, head_dim), np.float64)
    if factors.shape != ours.shape or not np.allclose(factors, ours, rtol=1e-5):
        raise InputError(f"{fields.path}: {_ROPE_FACTORS} isn't LLaMA 3's scaling; it can't be run faithfully")
    return rope
