"""The shape of a model from its source alone: no weights are read, and nothing is downloaded."""

import json
from pathlib import Path

from almost_jax.core.llama import LlamaConfig
from almost_jax.core.rotary import RopeConfig
from almost_jax.errors import InputError
from almost_jax.io.hf_config import parse_config
from almost_jax.io.models import CARD, saved_config
from almost_jax.io.paths import local_path

_WEIGHTS = Path(__file__).resolve().parents[1] / "microworld" / "weights"


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(32000, hidden, intermediate, layers, heads, heads, hidden // heads, rms_norm_eps=1e-6)


def _smollm2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        49152, hidden, intermediate, layers, heads, kv_heads, hidden // heads,
        rope=RopeConfig(theta=100000.0), tie_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip


# What their config.json files say (huggingface.co).
HUB = {
    "huggyllama/llama-7b": _llama(4096, 11008, 32, 32),
    "huggyllama/llama-13b": _llama(5120, 13824, 40, 40),
    "huggyllama/llama-30b": _llama(6656, 17920, 60, 52),
    "huggyllama/llama-65b": _llama(8192, 22016, 80, 64),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32),
}


def model_shape(key: str, source: str) -> LlamaConfig:
    """The shape behind an experiment's model source.

    Args:
        key: the config key, for messages.
        source: `microworld:NAME`, a folder of ours or of Hugging Face's, or a hub name of `HUB`.

    Raises:
        InputError: no shape is known.
    """
    if source in HUB:
        return HUB[source]
    folder = _WEIGHTS / source.removeprefix("microworld:") if source.startswith("microworld:") else local_path(source)
    if (folder / CARD).is_file():
        return saved_config(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{key}: no shape is known for {source!r}; give a folder with {CARD} (ours) or config.json (Hugging Face), "
            f"or one of {', '.join(HUB)}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a config ({error})") from error
    return parse_config(fields, str(path))
