"""Rollouts as people read them: rlsf/samples.jsonl, a few a step, and rlsf/rollouts.jsonl, all of a step with figures.

A line of rollouts.jsonl is a response: what it scored, what the score became, its KL and its mean advantage. The first
ones of a step also carry `per_token`, where each of these stands, token by token.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from almost_jax.io.distributed import from_primary
from almost_jax.io.records import Record, read_records
from almost_jax.io.tokenizer import Tokenizer

# Rollouts of a batch that are written to samples.jsonl, and token by token to rollouts.jsonl.
SAMPLES_SHOWN = 8
# Decimals in rollouts.jsonl.
DECIMALS = 4


def rollout_records(
    tokenizer: Tokenizer, queries: list[str], samples: Any, arrays: dict[str, np.ndarray], step: int
) -> list[Record]:
    """The responses of a step, in the order of the batch.

    Args:
        tokenizer: the policy's.
        queries: [B] texts.
        samples: `Samples` on the host.
        arrays: by name: `row_score` [B], not normalised, and `row_reward` [B], clipped and penalised; `logprobs`,
            `values`, `advantages`, `token_reward` and, with a reference, `token_kl`, [B, G] each.
        step: counted from 1.
    """
    records: list[Record] = []
    for row, query in enumerate(queries):
        size = int(samples.lengths[row])
        record = {
            "step": step,
            "query": query,
            "response": response_text(tokenizer, samples, row),
            "finish": finish(tokenizer, samples, row),
            "tokens": size,
            "score": _short(arrays["row_score"][row]),
            "reward": _short(arrays["row_reward"][row]),
            "kl": _short(_row_kl(arrays, samples, row)),
            "advantage": _short(arrays["advantages"][row, :size].mean()) if size else 0.0,
        }
        if row < SAMPLES_SHOWN:
            columns = {
                name: arrays[source][row]
                for name, source in (
                    ("logprob", "logprobs"),
                    ("kl", "token_kl"),
                    ("value", "values"),
                    ("reward", "token_reward"),
                    ("advantage", "advantages"),
                )
                if source in arrays
            }
            record["per_token"] = [
                {
                    "token": tokenizer.decode_exactly([int(samples.tokens[row, place])]),
                    **{name: _short(column[place]) for name, column in columns.items()},
                }
                for place in range(size)
            ]
        records.append(record)
    return records


def sample_records(
    tokenizer: Tokenizer, queries: list[str], samples: Any, arrays: dict[str, np.ndarray], step: int
) -> list[Record]:
    """The first rollouts of a step; arguments as in `rollout_records`, KL summed over each response."""
    shown = range(min(SAMPLES_SHOWN, len(queries)))
    return [
        {
            "step": step,
            "query": queries[row],
            "response": response_text(tokenizer, samples, row),
            "finish": finish(tokenizer, samples, row),
            "score": _finite(arrays["row_score"][row]),
            "kl": _finite(_row_kl(arrays, samples, row)),
        }
        for row in shown
    ]


def response_text(tokenizer: Tokenizer, samples: Any, row: int) -> str:
    """The response without what stopped it."""
    return tokenizer.decode(samples.tokens[row, : samples.content[row]].tolist())


def finish(tokenizer: Tokenizer, samples: Any, row: int) -> str:
    """How a response ended: "eos", "stop" (it ran on into a human turn) or "length"."""
    if not samples.stopped[row]:
        return "length"
    return "eos" if samples.tokens[row, samples.lengths[row] - 1] == tokenizer.eos_id else "stop"


def records_until(path: Path, step: int) -> list[Record]:
    """The records of a file, if it is there, up to the step that training goes on from."""
    # All processes read, or none does: reading waits for the others.
    there = from_primary(path.exists)
    return [record for record in read_records(path) if record["step"] <= step] if there else []


def _row_kl(arrays: dict[str, np.ndarray], samples: Any, row: int) -> float:
    """KL summed over a response; NaN without a reference."""
    return float(arrays["token_kl"][row, : int(samples.lengths[row])].sum()) if "token_kl" in arrays else math.nan


def _finite(number: Any) -> float | None:
    return float(number) if math.isfinite(number) else None


def _short(number: Any) -> float | None:
    """Rounded; None, as in metrics.jsonl, where it isn't finite, which a guard may let pass."""
    return round(float(number), DECIMALS) if math.isfinite(number) else None
