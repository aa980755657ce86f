"""config.json of Hugging Face folders, in old and new dialect: what a LLaMA's says, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

from almost_jax.core.llama import LlamaConfig
from almost_jax.core.rotary import RopeConfig
from almost_jax.errors import InputError

CAUSAL, CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"
# Mistral without its sliding window is a LLaMA by another name.
TYPES = {"llama": (CAUSAL, CLASSIFIER), "mistral": ("MistralForCausalLM", "MistralForSequenceClassification")}
DTYPES = ("float32", "bfloat16", "float16")

# Also written in the first conversions of LLaMA, before transformers had the class.
ALIASES = {"LLaMAForCausalLM": CAUSAL}
# Why other types of model, whose files look alike, can't be run as a LLaMA.
REASONS = {
    "mixtral": "its feed-forward is a mixture of experts",
    "qwen2": "its attention has biases",
    "qwen2_moe": "its feed-forward is a mixture of experts",
    "qwen3": "its queries and keys are normalised",
    "qwen3_moe": "its feed-forward is a mixture of experts",
    "gemma": "its norms and activations are others",
    "gemma2": "its norms and activations are others, and its window slides",
    "gemma3_text": "its norms and activations are others, and its window slides",
    "phi3": "its projections are fused",
    "llama4": "its feed-forward is a mixture of experts",
    "llama4_text": "its feed-forward is a mixture of experts",
    "ministral": "its window slides",
    "smollm3": "some of its layers have no rotary embeddings",
    "granite": "it scales embeddings, attention and residuals",
    "cohere": "its norms and its parallel layers are others",
    "olmo2": "its norms stand behind the layers",
    "gpt2": "another architecture",
    "gpt_neox": "another architecture",
    "opt": "another architecture",
}

# What config.json may leave out, and what transformers' LlamaConfig and MistralConfig then take.
DEFAULT_THETA, DEFAULT_EPS, DEFAULT_INIT = 10000.0, 1e-6, 0.02
DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072}
MISTRAL_WINDOW, MISTRAL_KV_HEADS = 4096, 8
# No dimension of a model comes near it; array libraries count to it.
LIMIT = 2**31
# Features that change the result and that our model lacks: the values that mean "off", and what it lacks.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
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
    is_classifier(fields, where)
    if fields["model_type"] == "mistral":
        # Only where the file is silent: null means none.
        fields = {"sliding_window": MISTRAL_WINDOW, "num_key_value_heads": MISTRAL_KV_HEADS, **fields}
    positions = _integer(fields, "max_position_embeddings", where, DEFAULT_POSITIONS[fields["model_type"]])
    fields = {**fields, "max_position_embeddings": positions}
    _check_window(fields, where)
    for key, off in UNSUPPORTED.items():
        # Numbers and flags are compared with their types: 1 isn't True here.
        if not any(fields.get(key) == value and type(fields.get(key)) is type(value) for value in off):
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
            max_position_embeddings=positions,
            initializer_range=_number(fields, "initializer_range", where, DEFAULT_INIT),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def is_classifier(fields: dict[str, Any], where: str) -> bool:
    """Whether a config.json is that of a reward model (a sequence classifier), and not of a language model.

    Raises:
        InputError: it is of another architecture.
    """
    model_type, classes = fields.get("model_type"), fields.get("architectures")
    known = TYPES.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        expected = " or ".join(map(repr, TYPES))
        reason = REASONS.get(model_type) if isinstance(model_type, str) else None
        raise InputError(
            f"{where}: model_type {model_type!r} isn't supported{f' ({reason})' if reason else ''}; expected {expected}"
        )
    if classes in (None, []):
        return False
    if isinstance(classes, list):
        classes = [ALIASES.get(name, name) if isinstance(name, str) else name for name in classes]
    if classes not in ([known[0]], [known[1]]):
        raise InputError(f"{where}: architectures {classes} isn't supported; expected ['{known[0]}'] or ['{known[1]}']")
    return bool(classes == [known[1]])


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
        # By its old name and its new one.
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    return {**fields, "num_labels": 1} if reward else fields


def _check_window(fields: dict[str, Any], where: str) -> None:
    """Refuse a sliding window that some position within the model's reach would see."""
    window, positions = fields.get("sliding_window"), fields["max_position_embeddings"]
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < positions:
        raise InputError(
            f"{where}: sliding_window {window!r} isn't supported: it hides what max_position_embeddings {positions} "
            "reach; expected null, or no less than these"
        )


def _parse_rope(fields: dict[str, Any], where: str) -> RopeConfig:
    nested: dict[str, Any] = {}
    # As transformers has it: the old field, where it is set, replaces the new one as a whole.
    for field in ("rope_parameters", "rope_scaling"):
        given = fields.get(field) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise InputError(f"{where}: {field} {given!r} isn't supported; expected one set for all layers")
        nested = given or nested
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"{where}: rope type {kind!r} can't be run faithfully; known: default, linear, llama3")
    if nested.get("partial_rotary_factor") not in (None, 1.0):
        factor = nested["partial_rotary_factor"]
        raise InputError(f"{where}: partial_rotary_factor {factor!r} isn't supported; expected 1")
    theta = _number({**fields, **nested}, "rope_theta", where, DEFAULT_THETA)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = _number(nested, "factor", where)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    low, high = _number(nested, "low_freq_factor", where), _number(nested, "high_freq_factor", where)
    if not low < high:
        raise InputError(f"{where}: low_freq_factor {low:g} isn't below high_freq_factor {high:g}")
    original = _integer(
        {**nested, **fields}, "original_max_position_embeddings", where, fields["max_position_embeddings"]
    )
    return RopeConfig(theta, kind, factor, low, high, original)


def _integer(fields: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LIMIT:
        raise InputError(f"{where}: {key} is {value!r}; expected a positive integer below {LIMIT:,}")
    return value


def _number(fields: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} is {value!r}; expected a positive number")
    return float(value)


def _flag(fields: dict[str, Any], key: str, where: str) -> bool:
    value = fields.get(key)
    if value not in (None, True, False):
        raise InputError(f"{where}: {key} is {value!r}; expected true or false")
    return bool(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a Hugging Face folder.

    Raises:
        InputError: there is none.
    """
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); expected a Hugging Face folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields
