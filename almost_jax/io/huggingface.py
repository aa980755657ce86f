"""LLaMA to and from Hugging Face folders: config.json and safetensors, in transformers' own names.

Export and import give back the same bytes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from almost_jax.core.heads import HEAD
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.errors import InputError
from almost_jax.io.hf_config import is_classifier, parse_config, read_json, render_config
from almost_jax.io.records import write_bytes
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.io.weights import DTYPES, Leaf, model_leaves, read_params, theirs

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
# Two matrices are compared so many rows at a time.
_ROWS = 4096
# A shard is put together in memory before it is written.
SHARD_BYTES = 2_000_000_000
# safetensors' names of dtypes; others are left as they are, and refused by name.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafetensorsSource:
    """The tensors of a folder's safetensors files.

    A file is opened anew for every tensor: what is mapped counts as used memory until it is closed.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            InputError: there are no safetensors files, or one is missing, cut or foreign.
        """
        self.where = str(folder)
        self._tensors: dict[str, tuple[Path, str, tuple[int, ...], str]] = {}
        for path in _weight_files(Path(folder)):
            try:
                with safe_open(str(path), framework="numpy") as file:
                    for name in file.keys():
                        part = file.get_slice(name)
                        shape, dtype = tuple(part.get_shape()), part.get_dtype()
                        self._tensors[name] = path, name, shape, _DTYPES.get(dtype, dtype)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path}: can't be read as safetensors ({error})") from error

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._tensors

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and dtype."""
        _, _, shape, dtype = self._tensors[name]
        return shape, dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor."""
        path, stored, _, _ = self._tensors[name]
        try:
            with safe_open(str(path), framework="numpy") as file:
                part: np.ndarray = file.get_slice(stored)[index]
                return part
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: tensor {name} can't be read ({error})") from error

    def rename(self, name: str, new: str) -> None:
        """Let a tensor go by another name."""
        self._tensors[new] = self._tensors.pop(name)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose headers are read, and nothing else.

    Attributes:
        config: the model's shape.
        reward: whether it is a sequence classifier.
        source: of its tensors.
        reward_mean, reward_std: of a reward model's raw scores, where we wrote them; else 0 and 1.
        score_at_end: whether a reward model's score is read at an end of text behind the text: what we wrote, else not.
    """

    config: LlamaConfig
    reward: bool
    source: SafetensorsSource
    reward_mean: float
    reward_std: float
    score_at_end: bool


def open_llama(folder: Path) -> Checkpoint:
    """Read a folder's config.json and the headers of its weights.

    Raises:
        InputError: a file is missing or broken, or the model isn't a LLaMA that can be run faithfully.
    """
    path = Path(folder) / "config.json"
    fields = read_json(path)
    config, reward = parse_config(fields, str(path)), is_classifier(fields, str(path))
    source = SafetensorsSource(Path(folder))
    if config.tie_embeddings and not reward:
        config = _untie_what_differs(config, source)
    if reward and HEAD_NAME not in source.names() and not config.tie_embeddings:
        # Sequence classifiers carry no output matrix; tied embeddings are the tree without one.
        config = dataclasses.replace(config, tie_embeddings=True)
    mean, std = fields.get("reward_mean", 0.0), fields.get("reward_std", 1.0)
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in (mean, std)) or std <= 0:
        raise InputError(f"{path}: reward_mean {mean!r} and reward_std {std!r}; expected finite numbers, std positive")
    at_end = bool(fields.get("score_at_end", "reward_mean" in fields))
    return Checkpoint(config, reward, source, float(mean), float(std), at_end)


def _untie_what_differs(config: LlamaConfig, source: SafetensorsSource) -> LlamaConfig:
    """The config of a tied model, after a look at its tensors, as transformers (5 and later) takes them.

    Of two matrices in the file the output's counts if it isn't the embedding; one alone serves as both.
    """
    names = set(source.names())
    if HEAD_NAME not in names:
        return config
    if EMBEDDING_NAME not in names:
        source.rename(HEAD_NAME, EMBEDDING_NAME)
        return config
    (shape, dtype), other = source.describe(EMBEDDING_NAME), source.describe(HEAD_NAME)
    if (shape, dtype) == other and len(shape) == 2 and dtype in DTYPES:
        blocks = [
            (slice(first, min(first + _ROWS, shape[0])), slice(0, shape[1])) for first in range(0, shape[0], _ROWS)
        ]
        if all(np.array_equal(source.read(EMBEDDING_NAME, part), source.read(HEAD_NAME, part)) for part in blocks):
            return config
    return dataclasses.replace(config, tie_embeddings=False)


def load_llama(folder: Path) -> tuple[LlamaConfig, Params]:
    """Read a Hugging Face folder.

    Returns:
        The config, with stacked layers, and NumPy parameters in the stored dtype (a reward model's with its head).

    Raises:
        InputError: a file is missing or broken, a tensor is missing, left over or of another shape than config.json
            says, or the model isn't a LLaMA that can be run faithfully.
    """
    found = open_llama(Path(folder))
    return found.config, read_params(found.config, found.reward, found.source, None, None)


def save_llama(
    folder: Path,
    config: LlamaConfig,
    params: Params,
    dtype: str,
    tokenizer: Tokenizer | None = None,
    extra: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights, each file atomically; a scalar head makes it a sequence classifier.

    Args:
        folder: made if missing; other files in it stay.
        config: of the parameters.
        params: stacked or unstacked layers, on any devices.
        dtype: of the stored weights: float32, bfloat16 or float16.
        tokenizer: when given, its files are written too, and its special ids stand in config.json.
        extra: further fields of config.json.
        shard_bytes: a file with more weights than this is split.

    Raises:
        InputError: another dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} can't be exported; known: {', '.join(DTYPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reward = HEAD in params
    shards = _plan_shards(config, reward, jnp.dtype(dtype).itemsize, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, rows in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            leaf.tensor(layer): np.ascontiguousarray(theirs(leaf, _held(params, leaf, layer)).astype(jnp.dtype(dtype)))
            for leaf, layer in rows
        }
        temporary = folder / f".{file}.tmp"
        save_file(tensors, str(temporary), metadata={"format": "pt"})
        os.replace(temporary, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    fields = render_config(config, dtype, reward)
    if tokenizer is not None:
        tokenizer.save(folder)
        special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        fields.update({f"{name}_token_id": token for name, token in special.items()})
    fields.update(extra or {})
    write_bytes(folder / "config.json", (json.dumps(fields, indent=2) + "\n").encode())


def _plan_shards(config: LlamaConfig, reward: bool, item_bytes: int, shard_bytes: int) -> list[list[tuple[Leaf, int]]]:
    """Tensors as (leaf, layer), layer after layer, in as few files as the limit allows in this order."""
    leaves = model_leaves(config, reward)
    layered = [leaf for leaf in leaves if leaf.layered]
    rows = [(leaf, 0) for leaf in leaves[:1]]
    rows += [(leaf, layer) for layer in range(config.num_layers) for leaf in layered]
    rows += [(leaf, 0) for leaf in leaves[1:] if not leaf.layered]
    shards: list[list[tuple[Leaf, int]]] = [[]]
    size = 0
    for leaf, layer in rows:
        more = math.prod(leaf.shape) * item_bytes
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((leaf, layer))
        size += more
    return shards


def _held(params: Params, leaf: Leaf, layer: int) -> np.ndarray:
    """One layer of a leaf of the tree; an array that was copied to the host once is not copied again."""
    stacked = not leaf.layered or "layers" in params
    node: Any = params if stacked else params[f"layers_{layer}"]
    for key in leaf.path if stacked else leaf.path[1:]:
        node = node[key]
    whole = np.asarray(jax.device_get(node))
    return whole[layer] if leaf.layered and stacked else whole


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{folder / INDEX}: no weight_map; expected the index of a sharded model")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name:
                raise InputError(f"{folder / INDEX}: {name!r} isn't a file's name; shards must lie beside the index")
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing; {INDEX} says that it holds a part of the weights")
        return [folder / name for name in files]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: a pickle can run any code when it is read and is refused; expected {SINGLE}"
        )
    raise InputError(f"{folder}: no {SINGLE} found; other weight files can't be read")
