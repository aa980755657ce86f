"""Make the golden files: tiny random LLaMA models by transformers, and the results it computes for them.

    .venv/bin/pip install -e '.[parity]' && .venv/bin/python tests/io/golden/make_golden.py [NAME ...]

Needs the extra `parity` (torch); `make test` reads only the files. Per variant a folder as transformers saves it, its
config.json then rewritten in the dialect that the variant is about, and expected.safetensors: what transformers makes
of that folder in float32, as tokens [B, T] int32, lengths [B] int32, and logits [B, T, V] float32, or scores [B]
float32 of reward models. Seeds are fixed: only another library changes the files.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
TOKENS = 29
SHAPE = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": 64}
# What a config.json may do without.
OPTIONAL = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings")
OPTIONAL += ("initializer_range", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "architectures")

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and how it is stored.

    Attributes:
        fields: of the config, beyond `SHAPE`.
        family: "Llama" or "Mistral".
        reward: whether it is a sequence classifier.
        dtype: of the stored weights.
        shards: whether they lie in several files.
        dialect: what is done to config.json after saving.
        both: whether a tied model's file holds an output matrix of its own too.
    """

    fields: Fields
    family: str = "Llama"
    reward: bool = False
    dtype: str = "float32"
    shards: bool = False
    dialect: Callable[[Fields], Fields] | None = None
    both: bool = False


def rope(kind: str = "default", theta: float = 10000.0, **scaling: float) -> Fields:
    """The field of config.json that describes rotary embeddings."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


def old_dialect(fields: Fields) -> Fields:
    """As releases before 5 wrote it: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    nested = dict(fields.pop("rope_parameters"))
    fields["rope_theta"] = nested.pop("rope_theta")
    fields["rope_scaling"] = None if nested["rope_type"] == "default" else nested
    fields["torch_dtype"] = fields.pop("dtype", "float32")
    return fields


def oldest_dialect(fields: Fields) -> Fields:
    """As LLaMA's first scaled files: the type by its short name, and no positions of its own."""
    fields = old_dialect(fields)
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"]["type"] = fields["rope_scaling"].pop("rope_type")
        fields["rope_scaling"].pop("original_max_position_embeddings", None)
    return fields


def bare_dialect(fields: Fields) -> Fields:
    """Without any field that may be missing."""
    return {key: value for key, value in fields.items() if key not in OPTIONAL}


def top_theta(fields: Fields) -> Fields:
    """The base beside the other fields of rotary embeddings, which know nothing of it."""
    fields["rope_theta"] = fields["rope_parameters"].pop("rope_theta")
    return fields


MHA = {"num_key_value_heads": 4}
VARIANTS: dict[str, Variant] = {
    "mha": Variant({**MHA, **rope()}),
    "gqa": Variant(rope()),
    "mqa": Variant({"num_key_value_heads": 1, **rope()}),
    "tied": Variant({"tie_word_embeddings": True, **rope()}),
    "linear": Variant(rope("linear", factor=2.5)),
    # Of these five frequencies the first is kept, the second blended, and the others are divided.
    "llama3": Variant({"head_dim": 10, **rope("llama3", theta=1234.0, **LLAMA3)}),
    "odd": Variant({"rms_norm_eps": 1e-1, **rope(theta=12.34)}),
    "head_dim": Variant({"head_dim": 10, **rope(theta=1234.0)}),
    "reward": Variant({"num_labels": 1, **rope(theta=1234.0)}, reward=True),
    "old_linear": Variant({"rms_norm_eps": 3e-2, **rope("linear", 77.7, factor=1.75)}, dialect=oldest_dialect),
    "old_llama3": Variant({"tie_word_embeddings": True, **rope("llama3", 99.0, **LLAMA3)}, dialect=oldest_dialect),
    "old_theta": Variant({"head_dim": 6, **rope(theta=321.0)}, dtype="bfloat16", shards=True, dialect=old_dialect),
    "top_theta": Variant({**MHA, **rope("linear", 55.5, factor=3.0)}, dtype="float16", dialect=top_theta),
    "bare": Variant({**MHA, **rope()}, dialect=bare_dialect),
    "padded": Variant({"vocab_size": 40, "rms_norm_eps": 1e-2, **rope(theta=7.5)}, dtype="bfloat16"),
    "both": Variant({"tie_word_embeddings": True, **rope(theta=44.0)}, both=True),
    "mistral": Variant(
        {"num_key_value_heads": 1, "head_dim": 6, "sliding_window": None, **rope(theta=66.0)}, "Mistral"
    ),
    "window": Variant({"sliding_window": 64, **rope(theta=88.0)}, "Mistral", shards=True),
    "old_reward": Variant(
        {"num_labels": 1, "head_dim": 10, "sliding_window": None, **rope("llama3", 222.0, **LLAMA3)},
        "Mistral",
        reward=True,
        dtype="float16",
        dialect=old_dialect,
    ),
}


def draw_variant(seed: int) -> Variant:
    """A variant with every choice drawn at random: shapes, rotary embeddings, numbers, dtype, shards, dialect."""
    rng = np.random.default_rng([2718, seed])

    def pick(*options: Any) -> Any:
        return options[rng.integers(len(options))]

    family, reward = pick("Llama", "Llama", "Mistral"), bool(rng.random() < 0.25)
    heads, kind = pick(1, 2, 3, 4, 6), pick("default", "linear", "llama3")
    scaling: Fields = {"factor": round(float(rng.uniform(1.1, 9)), 3)} if kind != "default" else {}
    if kind == "llama3":
        low = round(float(rng.uniform(0.5, 2)), 2)
        scaling |= {"low_freq_factor": low, "high_freq_factor": low + round(float(rng.uniform(0.5, 9)), 2)}
        scaling |= {"original_max_position_embeddings": int(rng.integers(16, 63))}
    fields: Fields = {
        "vocab_size": TOKENS + int(rng.integers(0, 20)),
        "hidden_size": heads * int(2 * rng.integers(2, 6)),
        "intermediate_size": int(rng.integers(5, 60)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": pick(*[count for count in range(1, heads + 1) if heads % count == 0]),
        "rms_norm_eps": float(10 ** rng.uniform(-8, -1)),
        "tie_word_embeddings": bool(rng.random() < 0.4) and not reward,
        **rope(kind, round(float(10 ** rng.uniform(0.5, 6)), 2), **scaling),
    }
    if rng.random() < 0.5:
        fields["head_dim"] = int(2 * rng.integers(1, 9))
    if family == "Mistral":
        fields["sliding_window"] = pick(None, 64, 1000)
    if reward:
        fields["num_labels"] = 1
    return Variant(
        fields,
        family,
        reward,
        pick("float32", "bfloat16", "float16"),
        bool(rng.random() < 0.4),
        pick(None, old_dialect, old_dialect, top_theta),
        bool(fields["tie_word_embeddings"] and rng.random() < 0.3),
    )


def make_folder(variant: Variant, seed: int, folder: Path) -> None:
    """A variant's folder: every weight is random, norm scales too."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{variant.family}Config")(**{**SHAPE, **variant.fields})
    kind = getattr(transformers, f"{variant.family}For{'SequenceClassification' if variant.reward else 'CausalLM'}")
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.to(getattr(torch, variant.dtype)).save_pretrained(folder, max_shard_size=6000 if variant.shards else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if variant.both and not variant.shards:
        _add_head(folder / "model.safetensors", seed)
    if variant.dialect is not None:
        path = folder / "config.json"
        fields = variant.dialect(json.loads(path.read_text()))
        path.write_text(json.dumps(fields, indent=2) + "\n")


def _add_head(path: Path, seed: int) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    drawn = np.random.default_rng(seed).normal(0, 0.3, embedding.shape)
    tensors["lm_head.weight"] = drawn.astype(embedding.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def make_tokens(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [2, 40] without the pad id, and ragged lengths [2]; what lies beyond a length is the pad id."""
    tokens = np.random.default_rng(seed).integers(1, TOKENS, (2, 40)).astype(np.int32)
    lengths = np.array([40, 23], np.int32)
    tokens[np.arange(40)[None, :] >= lengths[:, None]] = 0
    return tokens, lengths


def load_folder(folder: Path, reward: bool) -> Any:
    """What transformers makes of a folder, in float32.

    Raises:
        AssertionError: it finds too few tensors or too many.
    """
    import torch
    import transformers

    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def run_model(model: Any, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes: logits [B, T, V], or a reward model's scores [B]."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long()).logits.numpy()
    return out[:, 0] if out.ndim == 2 else out


def main(names: list[str]) -> None:
    """Write the folders of the variants with these names, or of all."""
    from safetensors.numpy import save_file

    for seed, (name, variant) in enumerate(VARIANTS.items(), start=11):
        if names and name not in names:
            continue
        tokens, lengths = make_tokens(seed)
        make_folder(variant, seed, FOLDER / name)
        out = run_model(load_folder(FOLDER / name, variant.reward), tokens)
        figures = {"tokens": tokens, "lengths": lengths, "scores" if variant.reward else "logits": out}
        figures = {key: np.ascontiguousarray(value) for key, value in figures.items()}
        save_file(figures, FOLDER / name / "expected.safetensors")
        print(name, out.shape, float(out.std()))


if __name__ == "__main__":
    main(sys.argv[1:])
