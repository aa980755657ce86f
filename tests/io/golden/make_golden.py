"""Make the golden files: tiny random LLaMA models by transformers, and the logits it computes for them.

    .venv/bin/pip install -e '.[parity]' && .venv/bin/python tests/io/golden/make_golden.py

Needs the extra `parity` (torch, transformers); `make test` reads only the files. Per variant a folder as transformers
saves it (config.json, model.safetensors) and expected.safetensors: tokens [B, T] int32, lengths [B] int32, and logits
[B, T, V] float32, or scores [B] float32 for the reward model. Seeds are fixed: only another library changes the files.
"""

from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
SHAPE = {
    "vocab_size": 29,
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


def rope(kind: str = "default", theta: float = 10000.0, **scaling: float) -> dict[str, Any]:
    """The field of config.json that describes rotary embeddings."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4, **rope()},
    "gqa": rope(),
    "mqa": {"num_key_value_heads": 1, **rope()},
    "tied": {"tie_word_embeddings": True, **rope()},
    "linear": rope("linear", factor=2.5),
    # Of these five frequencies the first is kept, the second blended, and the others are divided.
    "llama3": {"head_dim": 10, **rope("llama3", theta=1234.0, **LLAMA3)},
    "odd": {"rms_norm_eps": 1e-1, **rope(theta=12.34)},
    "head_dim": {"head_dim": 10, **rope(theta=1234.0)},
    "reward": {"num_labels": 1, **rope(theta=1234.0)},
}


def make_model(name: str, seed: int) -> Any:
    """A transformers model of a variant, float32, every weight random (norm scales too)."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SHAPE, **VARIANTS[name]})
    kind = transformers.LlamaForSequenceClassification if name == "reward" else transformers.LlamaForCausalLM
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def make_tokens(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [2, 40] without the pad id, and ragged lengths [2]; what lies beyond a length is the pad id."""
    tokens = np.random.default_rng(seed).integers(1, SHAPE["vocab_size"], (2, 40)).astype(np.int32)
    lengths = np.array([40, 23], np.int32)
    tokens[np.arange(40)[None, :] >= lengths[:, None]] = 0
    return tokens, lengths


def run_model(model: Any, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes: logits [B, T, V], or a reward model's scores [B]."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long()).logits.numpy()
    return out[:, 0] if out.ndim == 2 else out


def main() -> None:
    """Write every variant's folder."""
    from safetensors.numpy import save_file

    for seed, name in enumerate(VARIANTS, start=11):
        model = make_model(name, seed)
        tokens, lengths = make_tokens(seed)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        out = run_model(model, tokens)
        figures = {"tokens": tokens, "lengths": lengths, "scores" if name == "reward" else "logits": out}
        figures = {key: np.ascontiguousarray(value) for key, value in figures.items()}
        save_file(figures, FOLDER / name / "expected.safetensors")
        print(name, out.shape, float(out.std()))


if __name__ == "__main__":
    main()
