"""Two models' answers before a judge: an OpenAI-compatible endpoint or a reward model; the command and the stage.

Everything that costs something stays on disk: answers under the digest of model and settings, replies of the endpoint
under the hash of what was asked. The same call after a crash draws and asks for what is missing alone.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError
from almost_jax.evaluation import vicuna
from almost_jax.evaluation.judge import Judge
from almost_jax.evaluation.judge_prompts import JudgePrompt
from almost_jax.evaluation.statistics import Bootstrap
from almost_jax.io.models import Model
from almost_jax.io.records import Record, write_bytes


@dataclass(frozen=True)
class EndpointJudge:
    """A judge over HTTP, and what it is asked; over several duels its caps hold for all of them together."""

    judge: Judge
    prompt: JudgePrompt


@dataclass(frozen=True)
class RewardJudge:
    """A reward model as judge."""

    model: Model
    batch_size: int


def duel(
    questions: Sequence[Record],
    first: Sequence[Record],
    second: Sequence[Record],
    judge: EndpointJudge | RewardJudge,
    bootstrap: Bootstrap,
    names: tuple[str, str],
    out: Path,
) -> dict[str, Any]:
    """Judge two lists of answers and write the result.

    Args:
        questions: from `vicuna.read_questions`.
        first: answers in their order; these are whose wins are counted.
        second: the answers they are held against.
        judge: who judges.
        bootstrap: for the intervals.
        names: of both.
        out: of the result, JSON.

    Returns:
        What `vicuna.summarize` gives, with {"model", "against", "judge", "spent", "items"}; an item holds both answers,
        and `spent` is what the judge has cost so far.

    Raises:
        InputError: the judge's server refuses; replies that came before are kept.
    """
    pairs = vicuna.make_pairs(questions, first, second)
    if isinstance(judge, RewardJudge):
        items, judged_by = vicuna.score_pairs(pairs, judge.model, judge.batch_size), judge.model.name
        spent = None
    else:
        items, judged_by = vicuna.judge_pairs(pairs, judge.judge, judge.prompt), judge.judge.endpoint.model
        spent = asdict(judge.judge.spent)
    result = {
        "benchmark": "vicuna",
        "model": names[0],
        "against": names[1],
        "judge": judged_by,
        "judged_in": "both orders" if spent is not None else "no order: each answer is scored alone",
        **vicuna.summarize(items, bootstrap),
        "items": [
            {**item, "question": pair["question"], "answers": [pair["first"], pair["second"]]}
            for item, pair in zip(items, pairs, strict=True)
        ],
    }
    # What this call spent is no part of the result: a resumed one ends with the same file.
    write_bytes(out, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return {**result, "spent": spent}


def missing(items: Sequence[Record]) -> list[str]:
    """Why pairs have no verdict, a line for each such reply: first those that hold none, then those that never came."""
    unread, lost = [], []
    for item in items:
        for reply, winner in zip(item["replies"], item["winners"], strict=False):
            if winner is None and reply["error"] is not None:
                lost.append(f"question {item['question_id']}: {reply['error']}")
            elif winner is None:
                said = reply.get("refused") or f"no verdict in {reply['text'][:120]!r}"
                unread.append(f"question {item['question_id']}: {said}")
    return unread + lost


def check_judged(result: dict[str, Any], where: str) -> None:
    """Refuse a result in which replies never came.

    Raises:
        InputError: there are such; names one.
    """
    if result["not_judged"]:
        raise InputError(
            f"{where}: {result['not_judged']} of {len(result['items'])} pairs have no verdict yet "
            f"({missing(result['items'])[-1]}); the same command asks for what is missing"
        )
