"""Two models on a list of questions (the 80 of Vicuna, or any), by a judge: verdicts, win rates, agreement of judges.

Each pair is shown in both orders and the two readings must name the same winner; otherwise it is a tie. A reply without
two scores is counted and shown, never scored. Recorded FastChat reviews saw one order, so nothing is said of flips.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from almost_jax.errors import InputError
from almost_jax.evaluation.choices import dialogue_rewards
from almost_jax.evaluation.judge import Judge, Reply, parse_scores
from almost_jax.evaluation.judge_prompts import SCORES, JudgePrompt
from almost_jax.evaluation.statistics import LEVEL, Bootstrap, Clusters, exact_interval, share_interval
from almost_jax.io.models import Model
from almost_jax.io.records import Record, read_records
from almost_jax.stages.templates import Turn

VERDICTS = ("win", "tie", "loss")
_VALUE = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_RIDGE = 0.1  # on the slope of the length alone: keeps it finite when length separates wins from losses
_STEPS = 50


def read_pairs(questions: Path, first: Path, second: Path) -> list[Record]:
    """The questions in order with both models' answers: {"question_id", "question", "first", "second"}.

    Args:
        questions: lines of {"question_id", "text"} or, with one turn or more, {"question_id", "turns": [text, ...]}.
        first: lines of {"question_id", "text"}, the answers of the model whose wins are counted.
        second: the same of the model it is held against.

    Raises:
        InputError: a missing field, an id twice, or a question without an answer; names the file.
    """
    asked = read_questions(questions)
    return make_pairs(asked, *(read_answers(path, asked) for path in (first, second)))


def read_questions(path: Path) -> list[Record]:
    """The questions of a file in order: {"question_id", "question"}; of several turns the first.

    Raises:
        InputError: a missing field, or an id twice; names the file.
    """
    questions = []
    for key, record in _by_question(path).items():
        turns = record.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else record.get("text")
        if not isinstance(text, str):
            raise InputError(f"{path}, question_id {key!r}: text is {text!r}; expected a text")
        questions.append({"question_id": key, "question": text})
    if not questions:
        raise InputError(f"{path}: no questions")
    return questions


def read_answers(path: Path, questions: Sequence[Record]) -> list[Record]:
    """The answers of a file to these questions, in their order: {"question_id", "text"} with what else stands there.

    Raises:
        InputError: a missing field, an id twice, or a question without an answer; names the file.
    """
    found = _by_question(path)
    if missing := [one["question_id"] for one in questions if one["question_id"] not in found]:
        raise InputError(f"{path}: no answer to question_id {missing[0]!r} ({len(missing)} missing)")
    answers = [found[one["question_id"]] for one in questions]
    for one in answers:
        text = one.get("text")
        if not isinstance(text, str):
            raise InputError(f"{path}, question_id {one['question_id']!r}: text is {text!r}; expected a text")
    return answers


def make_pairs(questions: Sequence[Record], first: Sequence[Record], second: Sequence[Record]) -> list[Record]:
    """Questions with both models' answers, all three in one order, as `read_pairs` gives them."""
    return [
        {**question, "first": one["text"], "second": other["text"]}
        for question, one, other in zip(questions, first, second, strict=True)
    ]


def judge_pairs(pairs: Sequence[Record], judge: Judge, prompt: JudgePrompt = SCORES) -> list[Record]:
    """Every pair in both orders, as items of `judged_item`, in the order of `pairs`.

    Raises:
        InputError: the judge's server refuses; replies that came before are kept.
    """
    chats = [
        prompt.messages(pair["question"], *texts)
        for pair in pairs
        for texts in ((pair["first"], pair["second"]), (pair["second"], pair["first"]))
    ]
    replies = judge.ask(chats)
    return [
        judged_item(pair, replies[2 * place], replies[2 * place + 1], prompt) for place, pair in enumerate(pairs)
    ]


def score_pairs(pairs: Sequence[Record], model: Model, batch_size: int) -> list[Record]:
    """Every pair by a reward model, which sees one answer at a time: items of `judged_item` with one order, no reply.

    Raises:
        InputError: the model isn't a reward model.
    """
    if model.kind != "reward":
        raise InputError(f"model {model.name!r} is a {model.kind}; expected a reward model as judge")
    dialogues: list[list[Turn]] = [
        [{"role": "human", "text": pair["question"]}, {"role": "assistant", "text": pair[side]}]
        for pair in pairs
        for side in ("first", "second")
    ]
    rewards, _ = dialogue_rewards(model, dialogues, batch_size)
    items = []
    for place, pair in enumerate(pairs):
        scores = [float(one) for one in rewards[2 * place : 2 * place + 2]]
        items.append(
            {
                "question_id": pair["question_id"],
                "verdict": VERDICTS[1 - _sign(scores)],
                "winners": [_sign(scores)],
                "scores": [scores],
                "lengths": [len(pair["first"]), len(pair["second"])],
                "replies": [],
            }
        )
    return items


def judged_item(pair: Record, straight: Reply, swapped: Reply, prompt: JudgePrompt = SCORES) -> Record:
    """The verdict on `first` from two replies, in `swapped` of which the second answer was shown first.

    Returns:
        {"question_id", "verdict": win, tie, loss or None, "winners": 1, 0 or -1 by order (1: `first` is better; None:
        unread), "scores": [first, second] by order (None where the prompt asks for a letter), "lengths": characters of
        both, "replies": the fields of `Reply` by order}.
    """
    winners: list[int | None] = []
    scores: list[list[float] | None] = []
    for place, reply in enumerate((straight, swapped)):
        winner, found = (None, None) if reply.text is None else prompt.read(reply.text)
        winners.append(winner if winner is None or place == 0 else -winner)
        scores.append(found if found is None or place == 0 else found[::-1])
    verdict = None
    if winners[0] is not None and winners[1] is not None:
        verdict = VERDICTS[1 - winners[0]] if winners[0] == winners[1] else "tie"
    return {
        "question_id": pair["question_id"],
        "verdict": verdict,
        "winners": winners,
        "scores": scores,
        "lengths": [len(pair["first"]), len(pair["second"])],
        "replies": [asdict(straight), asdict(swapped)],
    }


def read_reviews(path: Path, pairs: Sequence[Record] = ()) -> list[Record]:
    """Recorded FastChat reviews as items of `judged_item` with one order each.

    Args:
        path: lines of {"question_id", "score": [first, second], "text"}; without `score`, the text's first line counts.
            A score below 0 is FastChat's mark of a reply without scores.
        pairs: the answers that were judged, when lengths are wanted.

    Raises:
        InputError: a missing or doubled question_id, or scores that aren't two numbers.
    """
    lengths = {pair["question_id"]: [len(pair["first"]), len(pair["second"])] for pair in pairs}
    items = []
    for key, record in _by_question(path).items():
        text = record.get("text")
        found = record.get("score")
        if found is None:
            found = parse_scores(text) if isinstance(text, str) else None
        elif not (isinstance(found, list) and len(found) == 2 and all(type(one) in (int, float) for one in found)):
            raise InputError(f"{path}, question_id {key!r}: score is {found!r}; expected [first, second]")
        scores = None if found is None or min(found) < 0 else [float(one) for one in found]
        winner = None if scores is None else _sign(scores)
        items.append(
            {
                "question_id": key,
                "verdict": None if winner is None else VERDICTS[1 - winner],
                "winners": [winner],
                "scores": [scores],
                "lengths": lengths.get(key),
                "replies": [{"text": text, "error": None}],
            }
        )
    return items


def summarize(items: Sequence[Record], bootstrap: Bootstrap) -> dict[str, Any]:
    """Counts and rates over items.

    Returns:
        {"win", "tie", "loss", "unparsed", "not_judged": counts; "win_rate": {"mean", "ci95", "n"}, ties as a half;
        "length_controlled": the same at equal length, None without lengths; "flips": None for one order}. With both
        orders flips is {"pairs", "disagreements", "flips", "first_place": of the flips those that both times prefer
        what is shown first}. A pair with an unread reply is `not_judged` if one of its replies never came, else
        `unparsed`. Rates are None when nothing was judged.
    """
    judged = [item for item in items if item["verdict"] is not None]
    lost = sum(
        any(reply["error"] is not None for reply in item["replies"]) for item in items if item["verdict"] is None
    )
    counts = {verdict: sum(item["verdict"] == verdict for item in judged) for verdict in VERDICTS}
    values = np.asarray([_VALUE[item["verdict"]] for item in judged])
    known = bool(judged) and all(item["lengths"] is not None for item in judged)
    return {
        **counts,
        "unparsed": len(items) - len(judged) - lost,
        "not_judged": lost,
        "win_rate": share_interval(Clusters(values, np.ones(len(values))), bootstrap) if judged else None,
        "length_controlled": length_controlled(values, _longer(judged), bootstrap) if known else None,
        "flips": _flips(judged) if judged and all(len(item["winners"]) == 2 for item in judged) else None,
    }


def length_controlled(values: np.ndarray, longer: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """The win rate at equal length: sigmoid(a) of the fit sigmoid(a + b tanh(d / std(d))), as AlpacaEval 2 has it.

    Args:
        values: [N] 1 for a win, 0.5 for a tie, 0 for a loss.
        longer: [N] characters that the first answer is longer than the second, d above.
        bootstrap: resamples of the N pairs for the interval.

    Returns:
        {"mean", "ci95", "n"}; where all pairs end alike, with the exact interval of the rate itself. The source is
        arXiv 2404.04475, without its terms for models and instructions.
    """
    if np.ptp(values) == 0:
        # Length can't explain what doesn't vary, and no resample would differ.
        return {"mean": float(values[0]), "ci95": exact_interval(float(values[0]), len(values)), "n": len(values)}
    spread = float(np.std(longer))
    scaled = np.tanh(longer / spread) if spread else np.zeros(len(longer))
    generator = np.random.default_rng(bootstrap.seed)
    rows = generator.integers(0, len(values), size=(bootstrap.samples, len(values)))
    tail = 100 * (1 - LEVEL) / 2
    drawn = [_at_equal_length(values[row], scaled[row]) for row in rows]
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return {"mean": _at_equal_length(values, scaled), "ci95": [float(low), float(high)], "n": len(values)}


def compare_judges(first: Sequence[Record], second: Sequence[Record]) -> dict[str, Any]:
    """How far two judges agree on the questions that both judged.

    Returns:
        {"n", "agreement": share of equal verdicts, "kappa": Cohen's over win, tie and loss (None where chance alone
        agrees always), "table": [3, 3] counts, rows by the first judge, columns by the second, in that order}.

    Raises:
        InputError: they share no judged question.
    """
    other = {item["question_id"]: item["verdict"] for item in second}
    table = np.zeros((3, 3), dtype=np.int64)
    for item in first:
        verdicts = item["verdict"], other.get(item["question_id"])
        if None not in verdicts:
            table[VERDICTS.index(verdicts[0]), VERDICTS.index(verdicts[1])] += 1
    total = int(table.sum())
    if not total:
        raise InputError("the two judges share no question that both judged")
    agreement = float(np.trace(table)) / total
    chance = float(table.sum(axis=1) @ table.sum(axis=0)) / total**2
    kappa = None if chance == 1 else (agreement - chance) / (1 - chance)
    return {"n": total, "agreement": agreement, "kappa": kappa, "table": table.tolist()}


def _longer(items: Sequence[Record]) -> np.ndarray:
    return np.asarray([item["lengths"][0] - item["lengths"][1] for item in items], np.float64)


def _at_equal_length(values: np.ndarray, scaled: np.ndarray) -> float:
    if np.all(values == values[0]) and values[0] in (0.0, 1.0):
        # No finite intercept fits, and length can't explain what doesn't vary.
        return float(values[0])
    features = np.stack([np.ones(len(values)), scaled], axis=1)
    penalty = np.diag([0.0, _RIDGE])
    rate = float(np.clip(values.mean(), 1e-6, 1 - 1e-6))
    found = np.asarray([np.log(rate / (1 - rate)), 0.0])
    for _ in range(_STEPS):
        chances = expit(features @ found)
        slope = features.T @ (values - chances) - penalty @ found
        curve = (features * (chances * (1 - chances))[:, None]).T @ features + penalty
        step = np.linalg.solve(curve + 1e-12 * np.eye(2), slope)
        # Newton's steps may overshoot where chances are near 0 or 1.
        found = found + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-9:
            break
    return float(expit(found[0]))


def _flips(items: Sequence[Record]) -> dict[str, int]:
    flipped = [item["winners"] for item in items if item["winners"][0] * item["winners"][1] < 0]
    return {
        "pairs": len(items),
        "disagreements": sum(item["winners"][0] != item["winners"][1] for item in items),
        "flips": len(flipped),
        "first_place": sum(winners[0] > 0 for winners in flipped),
    }


def _sign(scores: Sequence[float]) -> int:
    return int(scores[0] > scores[1]) - int(scores[0] < scores[1])


def _by_question(path: Path) -> dict[Any, Record]:
    found: dict[Any, Record] = {}
    for number, record in enumerate(read_records(path), start=1):
        key = record.get("question_id")
        if not isinstance(key, int | str):
            raise InputError(f"{path}, record {number}: question_id is {key!r}; expected a number or a text")
        if key in found:
            raise InputError(f"{path}, record {number}: question_id {key!r} stands twice")
        found[key] = record
    return found
