"""SmolLM2 as a Tunix model: its llama3 at our shape, weights by its own loader, logits checked against ours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import logits_differences
from training_tasks import head
from tunix.models.llama3 import model as llama3
from tunix.models.llama3.params import create_model_from_safe_tensors


def load(spec: dict[str, Any]) -> llama3.Llama3:
    """The model of the run's folder in the run's dtype.

    Tunix 0.1.7 never hands the config's `rope_theta` to its rotary function, whose default is a million; the default
    is set to ours, without which it would be another model.
    """
    shape = spec["shape"]
    assert spec["tied"], "the benchmark's model ties its embeddings"
    *before, _ = llama3.apply_rope.__defaults__
    llama3.apply_rope.__defaults__ = (*before, spec["theta"])
    config = llama3.ModelConfig(
        num_layers=shape["num_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_kv_heads"],
        rope_theta=spec["theta"],
        norm_eps=spec["eps"],
        weight_tying=True,
    )
    return create_model_from_safe_tensors(spec["folder"], config, make_mesh(), jnp.dtype(spec["dtype"]))


def make_mesh() -> jax.sharding.Mesh:
    """One device under the axis names that Tunix's shardings use."""
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))


def causal(batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Positions [B, T] and a causal mask [B, T, T] of rows that are padded, if at all, on the right."""
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return positions, mask


def compare_logits(model: llama3.Llama3, reference: str) -> dict[str, float]:
    """Its logits against ours, see `harness.logits_differences`."""
    ours = np.load(reference)
    tokens = jnp.asarray(ours["tokens"])
    found, _ = nnx.jit(lambda model, tokens: model(tokens, *_context(tokens)))(model, tokens)
    return logits_differences(np.asarray(found, np.float32), ours["logits"])


def _context(tokens: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    positions, mask = causal(*tokens.shape)
    return positions, None, mask


class Scored(llama3.Llama3):
    """A critic or reward model: the language model with a scalar head for its output.

    Tunix's PPO hands such models `segment_ids`, which its llama3 doesn't know; without packing they say no more than
    the mask does.
    """

    def __call__(
        self, input_tokens: Any, positions: Any, cache: Any, attention_mask: Any, segment_ids: Any = None
    ) -> tuple[jax.Array, Any]:
        return super().__call__(input_tokens, positions, cache, attention_mask)


def scored(model: llama3.Llama3, spec: dict[str, Any]) -> Scored:
    """The model with everyone's scalar head in the place of its output; takes over its weights."""
    hidden = spec["shape"]["hidden_size"]
    config = dataclasses.replace(model.config, weight_tying=False)
    made = nnx.eval_shape(lambda: Scored(config, rngs=nnx.Rngs(0)))
    made.embedder, made.layers, made.final_norm = model.embedder, model.layers, model.final_norm
    made.lm_head = nnx.Linear(hidden, 1, use_bias=False, rngs=nnx.Rngs(0))
    made.lm_head.kernel.value = jnp.asarray(head(hidden))[:, None]
    return made


def spare_token(text: np.ndarray, vocab_size: int) -> int:
    """A token for padding: Tunix finds padding by equality, so it must be one that no prompt holds."""
    held = set(text.tolist())
    return next(token for token in reversed(range(vocab_size)) if token not in held)


class Identifiers:
    """A tokenizer whose texts are token ids in decimals: the benchmark's prompts go in and out without loss."""

    def __init__(self, pad_id: int, eos_id: int) -> None:
        self._pad_id, self._eos_id = pad_id, eos_id

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self) -> int | None:
        return None

    def eos_id(self) -> int:
        return self._eos_id

    def pad_id(self) -> int:
        return self._pad_id
