"""Worker: what all engines of a run are given: the weights as a Hugging Face folder, a text's tokens, our logits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import ROOT, serve

from almost_jax.config import MeshConfig
from almost_jax.core.llama import hidden_states, logits
from almost_jax.core.partitioning import make_mesh
from almost_jax.io.huggingface import save_llama
from almost_jax.io.models import load_model

REFERENCE_TOKENS = 48


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Write them into the run's folder, and return the model's shape."""
    folder = Path(spec["work"])
    model = load_model(spec["model"], make_mesh(MeshConfig()), "float32")
    save_llama(folder / "hf", model.config, model.params, "float32", model.tokenizer)
    text = np.array(model.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8")), np.int32)
    np.save(folder / "text.npy", text)
    tokens = np.stack([text[:REFERENCE_TOKENS], text[-REFERENCE_TOKENS:]])
    states = hidden_states(model.params, model.config, jnp.asarray(tokens))
    np.savez(folder / "reference.npz", tokens=tokens, logits=jax.device_get(logits(model.params, model.config, states)))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    return {
        "folder": str(folder / "hf"),
        "text": str(folder / "text.npy"),
        "reference": str(folder / "reference.npz"),
        "shape": {name: getattr(model.config, name) for name in names},
        "theta": model.config.rope.theta,
        "eps": model.config.rms_norm_eps,
        "tied": model.config.tie_embeddings,
    }


if __name__ == "__main__":
    serve(prepare)
