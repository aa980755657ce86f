r"""The static HHH comparisons (BIG-bench, 221 of them): helpful, honest, harmless, other.

A comparison is a dialogue and two answers, of which people labelled one as better. The dialogue is put into the format
that prompts, fine-tuning and reward models share (`stages.templates`), the same text for every model: a language model
reads `"Human: {input}\n\nAssistant:"`, then a space and the choice, and the choice with the higher total log-prob is
its choice, as in BIG-bench; a reward model scores the dialogue with the choice as its last turn. Verdicts don't depend
on the order of the choices: a tie counts half. Source: Askell et al. 2021 (arXiv 2112.00861); ALMoST section 4.2.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError
from almost_jax.evaluation.choices import choice_likelihoods, dialogue_rewards
from almost_jax.io.models import Model
from almost_jax.io.records import Record, read_records
from almost_jax.stages.templates import Role, Turn, query_prompt

HUB = "HuggingFaceH4/hhh_alignment"
EXPORT = "refs/convert/parquet"
SUBSETS = ("harmless", "helpful", "honest", "other")
SEPARATOR = " "
DECIDES = {"policy": "logprobs", "reward": "rewards"}

_LABEL = re.compile(r"\n\s*(Human|Assistant):[ \t]*")
_ROLES: dict[str, Role] = {"Human": "human", "Assistant": "assistant"}


def load_comparisons(path: Path | None) -> list[Record]:
    """The comparisons of a file, or all 221 from the hub.

    Raises:
        InputError: they can't be had, or break the format.
    """
    if path is not None:
        return read_comparisons(path)
    records: list[Record] = []
    for subset in SUBSETS:
        records += [{"subset": subset, **row} for row in _from_hub(subset)]
    return _checked(records, HUB)


def _from_hub(subset: str) -> Iterable[Record]:
    """A subset's rows. The repository holds a script, which newer `datasets` refuse: the hub's own export goes first.

    In that export a subset is a folder, and its name no configuration.
    """
    from datasets import load_dataset

    faults = []
    for arguments, settings in (((HUB,), {"data_dir": subset, "revision": EXPORT}), ((HUB, subset), {})):
        try:
            rows: Iterable[Record] = load_dataset(*arguments, split="test", **settings)
        # The library lets through whatever the network raises.
        except Exception as error:
            faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            return rows
    raise InputError(
        f"{HUB} ({subset}): can't be had from the hub ({'; '.join(dict.fromkeys(faults))}); --data FILE, in a run "
        "evaluation.hhh.data, reads it from a JSON-lines file in the same fields"
    )


def read_comparisons(path: Path) -> list[Record]:
    """The comparisons of a JSON-lines file in the fields of `HuggingFaceH4/hhh_alignment`, and `subset`.

    Raises:
        InputError: a comparison without these fields, or without exactly one right choice of two; names file and place.
    """
    records = read_records(path)
    if not records:
        raise InputError(f"{path}: is empty; expected comparisons")
    return _checked(records, str(path))


def dialogue(text: str) -> list[Turn]:
    """The turns of a comparison's `input`: it begins with the human's words and may hold further labelled turns.

    Raises:
        InputError: its turns don't alternate, or the last one isn't the human's.
    """
    parts = _LABEL.split(text)
    turns: list[Turn] = [{"role": "human", "text": parts[0].strip()}]
    for label, words in zip(parts[1::2], parts[2::2], strict=True):
        turns.append({"role": _ROLES[label], "text": words.strip()})
    if any(one["role"] == other["role"] for one, other in zip(turns, turns[1:], strict=False)):
        raise InputError(f"input {text[:80]!r}: a speaker has two turns in a row")
    if turns[-1]["role"] != "human":
        raise InputError(f"input {text[:80]!r}: ends with the assistant's turn; expected the human's")
    return turns


def judge(model: Model, comparisons: Sequence[Record], batch_size: int) -> list[Record]:
    """What a model makes of every comparison.

    Args:
        model: a language model or a reward model.
        comparisons: from `load_comparisons`.
        batch_size: texts per forward pass.

    Returns:
        Items {"subset", "prompt", "separator", "choices", "labels", "right": 1, 0 or 0.5} in the order given, with
        "logprobs" (totals, which decide), "tokens" and "logprobs_per_token" of each choice for a language model, and
        "right_per_token", what the means would have decided; with "rewards" for a reward model.
    """
    dialogues = [dialogue(one["input"]) for one in comparisons]
    prompts = [query_prompt(turns, "assistant") for turns in dialogues]
    choices = [one["targets"]["choices"] for one in comparisons]
    items = [
        {
            "subset": one["subset"],
            "prompt": prompt,
            "separator": SEPARATOR,
            "choices": list(texts),
            "labels": list(one["targets"]["labels"]),
        }
        for one, prompt, texts in zip(comparisons, prompts, choices, strict=True)
    ]
    if model.kind == "reward":
        whole: list[list[Turn]] = [
            [*turns, {"role": "assistant", "text": text}]
            for turns, texts in zip(dialogues, choices, strict=True)
            for text in texts
        ]
        rewards, _ = dialogue_rewards(model, whole, batch_size)
        for place, item in enumerate(items):
            scores = [float(one) for one in rewards[2 * place : 2 * place + 2]]
            item |= {"rewards": scores, "right": verdict(scores, item["labels"])}
        return items
    pairs = [(prompt, SEPARATOR + text) for prompt, texts in zip(prompts, choices, strict=True) for text in texts]
    found, _ = choice_likelihoods(model, pairs, batch_size)
    for place, item in enumerate(items):
        two = found[2 * place : 2 * place + 2]
        totals = [one.total for one in two]
        means = [one.total / max(len(one.logprobs), 1) for one in two]
        item |= {
            "logprobs": totals,
            "tokens": [len(one.logprobs) for one in two],
            "logprobs_per_token": means,
            "right": verdict(totals, item["labels"]),
            "right_per_token": verdict(means, item["labels"]),
        }
    return items


def summarize(items: Sequence[Record], kind: str) -> dict[str, Any]:
    """Accuracy over all items and by subset; for a language model also what the log-prob per token would have given.

    Returns:
        {"accuracy", "by_subset", "n", "decided_by": "logprobs" or "rewards", "per_token": {"accuracy", "by_subset"} or
        None}.
    """
    subsets = [item["subset"] for item in items]
    per_token = None
    if kind == "policy":
        per_token = accuracies(subsets, [item["right_per_token"] for item in items])
    return {
        **accuracies(subsets, [item["right"] for item in items]),
        "n": len(items),
        "decided_by": DECIDES[kind],
        "per_token": per_token,
    }


def _checked(records: list[Record], source: str) -> list[Record]:
    for number, record in enumerate(records, start=1):
        where = f"{source}, record {number}"
        for key in ("input", "subset"):
            if not isinstance(record.get(key), str):
                raise InputError(f"{where}: {key} is {record.get(key)!r}; expected a text")
        targets = record.get("targets")
        if not isinstance(targets, dict):
            raise InputError(f"{where}: targets is {targets!r}; expected choices and labels")
        choices, labels = targets.get("choices"), targets.get("labels")
        if not isinstance(choices, list) or len(choices) != 2 or not all(isinstance(one, str) for one in choices):
            raise InputError(f"{where}: targets.choices is {choices!r}; expected two texts")
        if labels not in ([1, 0], [0, 1]):
            raise InputError(f"{where}: targets.labels is {labels!r}; expected a 1 and a 0")
        try:
            dialogue(record["input"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return records


def verdict(scores: Sequence[float], labels: Sequence[int]) -> float:
    """1 when the labelled one of two choices scores higher, 0 when lower; a tie is chance, 0.5."""
    right, wrong = scores[labels.index(1)], scores[labels.index(0)]
    return 0.5 if right == wrong else float(right > wrong)


def accuracies(subsets: Sequence[str], verdicts: Sequence[float]) -> dict[str, Any]:
    """The mean verdict over all comparisons (`accuracy`) and within each subset (`by_subset`)."""
    groups: dict[str, list[float]] = {}
    for subset, right in zip(subsets, verdicts, strict=True):
        groups.setdefault(subset, []).append(right)
    return {
        "accuracy": sum(verdicts) / len(verdicts),
        "by_subset": {name: sum(group) / len(group) for name, group in groups.items()},
    }
