"""Worker: SFT and reward model steps by transformers on torch, in a plain loop as one writes it for speed.

The faster attention implementation, then the faster of torch's foreach and fused AdamW, are taken by one step of each.
torch.compile, which needs a C++ compiler on the machine, is left out.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import serve
from training_tasks import (
    B1,
    B2,
    EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    TIMED,
    WEIGHT_DECAY,
    head,
    rewarded,
    sizes,
    windows,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ATTENTIONS, OPTIMIZERS = ("sdpa", "eager"), ("foreach", "fused")


def sft_loss(model: Any, rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy."""
    logits = model(rows, use_cache=False).logits
    # The targets are shifted, since a slice of the logits would copy the largest array.
    targets = torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def reward_loss(model: Any, rows: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Mean pairwise ranking loss: the first half of the rows is preferred to the second.

    Scores are read at each row's place `last`; padding stands behind it, where a causal model needs no mask for it.
    """
    states = model.model(rows, use_cache=False).last_hidden_state[torch.arange(len(rows)), last]
    chosen, rejected = model.score(states)[:, 0].chunk(2)
    return torch.nn.functional.softplus(rejected - chosen).mean()


def load(task: str, folder: str, hidden_size: int) -> Any:
    """The model of a task in float32, with everyone's head."""
    if task == "sft":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.score.weight.data.copy_(torch.from_numpy(head(hidden_size))[None])
    return model


def make_step(model: Any, loss_of: Callable[..., torch.Tensor], kind: str) -> Callable[..., float]:
    """A training step that returns its loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, weight_decay=WEIGHT_DECAY, **{kind: True}
    )

    def step(rows: torch.Tensor, last: torch.Tensor) -> float:
        loss = loss_of(model, rows, last)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Time the variants, then the faster one from the start."""
    torch.set_num_threads(spec["cores"])
    size, task, hidden = sizes(spec["quick"]), spec["task"], spec["shape"]["hidden_size"]
    text = np.load(spec["text"])

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if task == "sft":
            tokens, lengths = windows(text, size.rows, size.tokens), np.full(size.rows, size.tokens)
        else:
            tokens, lengths = rewarded(task, text, size, step)
        return torch.from_numpy(tokens).long(), torch.from_numpy(lengths).long() - 1

    batch = batch_at(0)
    plain = sft_loss if task == "sft" else reward_loss

    def loss_of(model: Any, rows: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        # Parameters and optimizer stay in float32.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            return plain(model, rows, last)

    model = load(task, spec["folder"], hidden)
    model.train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probes: dict[str, float] = {}

    def fastest(variants: list[tuple[str, str]]) -> tuple[str, str]:
        for attention, kind in variants:
            model.set_attn_implementation(attention)
            step = make_step(model, loss_of, kind)
            step(*batch)
            begin = time.perf_counter()
            step(*batch)
            probes[f"{attention} {kind}"] = time.perf_counter() - begin
        return tuple(min(probes, key=probes.__getitem__).split())

    attention, _ = fastest([(name, OPTIMIZERS[0]) for name in ATTENTIONS])
    attention, kind = fastest([(attention, name) for name in OPTIMIZERS[1:]])
    model.set_attn_implementation(attention)
    model.load_state_dict(start)
    step = make_step(model, loss_of, kind)
    losses = [step(*batch)]
    seconds = []
    timed = [batch_at(1 + place) for place in range(TIMED)] if task == "pairs" else [batch] * size.steps
    for batch in timed * spec["repeats"]:
        begin = time.perf_counter()
        losses.append(step(*batch))
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses, "variant": f"{attention} {kind}", "probe_seconds": probes}


if __name__ == "__main__":
    serve(main)
