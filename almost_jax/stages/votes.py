"""Pairs that a community preferred, from data sets of questions with voted answers.

Source: ALMoST (arXiv 2305.13735), section 2.2, which takes 20k pairs of StackExchange, the higher-voted answer being
preferred.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

from almost_jax.errors import InputError
from almost_jax.io.paths import local_path

HUB = "hub:"
_BLOCKS = frozenset(("p", "pre", "blockquote", "ul", "ol", "h1", "h2", "h3", "h4", "hr", "table"))
# Data sets are read from their beginning, so this many records are mixed to have questions of more than one week.
_SHUFFLE_BUFFER = 2000


def votes_are_a_file(votes: str) -> bool:
    """Whether `as_is_reward.votes` names a file."""
    return votes not in ("microworld", "none") and not votes.startswith(HUB)


def hub_votes(votes: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` pairs of a data set, shuffled by `seed` within a window, through the `datasets` library.

    Args:
        votes: `hub:OWNER/NAME`, with `/FOLDER` behind it for a part of the data set, or `hub:` and a folder.
        count: the most pairs to take; read as a stream, so no more than these are fetched.
        seed: of the shuffling.

    Returns:
        Records {prompt, chosen, rejected} as `pair_of_record` makes them.

    Raises:
        InputError: the data set can't be had, or no record of it holds a pair.
    """
    import datasets

    name = votes.removeprefix(HUB)
    owner_and_name = re.match(r"[^/.][^/]*/[^/]+", name)
    place, folder = str(local_path(name)) if name.startswith("gs://") else name, None
    if owner_and_name is not None:
        place, folder = owner_and_name[0], name[owner_and_name.end() + 1 :] or None
    try:
        stream = datasets.load_dataset(place, data_dir=folder, split="train", streaming=True)
        found = list(_first(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), count))
    except InputError:
        raise
    # The library raises its own errors, those of several clients, and those of the file system.
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"as_is_reward.votes: {votes}: the data set can't be read ({why}); give a jsonl file of prompt, chosen and "
            "rejected, or none"
        ) from error
    if not found:
        raise InputError(
            f"as_is_reward.votes: {votes}: no record has a pair; needed are `chosen` and `rejected`, `response_j` and "
            "`response_k`, or `answers` with `text` and `pm_score`"
        )
    return found


def pair_of_record(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A pair {prompt, chosen, rejected} from one record of a data set, None if it holds none.

    Understood are the fields of HuggingFaceH4/stack-exchange-preferences (`question`, `answers` with `text` and
    `pm_score`: the answer of most votes against the one of fewest, if these differ), of lvwerra/stack-exchange-paired
    (`question`, `response_j`, `response_k`), and `chosen`, `rejected` with or without `prompt`. Markup becomes text.
    """
    answers = record.get("answers")
    if isinstance(answers, list) and isinstance(record.get("question"), str):
        voted = [answer for answer in answers if isinstance(answer.get("pm_score"), int) and answer.get("text")]
        if not voted:
            return None
        best = max(voted, key=lambda answer: answer["pm_score"])
        worst = min(voted, key=lambda answer: answer["pm_score"])
        if best["pm_score"] == worst["pm_score"]:
            return None
        return _pair(record["question"], best["text"], worst["text"])
    if "response_j" in record and "response_k" in record:
        return _pair(record.get("question"), record["response_j"], record["response_k"])
    if "chosen" in record and "rejected" in record:
        found = {name: record[name] for name in ("prompt", "chosen", "rejected") if record.get(name) is not None}
        return found if all(isinstance(text, str) and text.strip() for text in found.values()) else None
    return None


def plain_text(markup: str) -> str:
    """The text of a piece of HTML: blocks become paragraphs, list items dashes, and code stays as it stands."""
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(reader.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n\n")
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "li":
            self.parts.append("\n- ")
        self._verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._verbatim -= tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self._verbatim:
            self.parts.append(data)
        elif data.strip():
            self.parts.append(re.sub(r"\s+", " ", data if not self._at_line_start() else data.lstrip()))
        elif not self._at_line_start():
            self.parts.append(" ")

    def _at_line_start(self) -> bool:
        return not self.parts or self.parts[-1].endswith(("\n", "- "))


def _first(records: Iterable[Mapping[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    taken = 0
    for record in records:
        if taken >= count:
            return
        pair = pair_of_record(record)
        if pair is not None:
            taken += 1
            yield pair


def _pair(question: Any, better: Any, worse: Any) -> dict[str, Any] | None:
    if not all(isinstance(text, str) for text in (question, better, worse)):
        return None
    found = {"prompt": plain_text(question), "chosen": plain_text(better), "rejected": plain_text(worse)}
    return found if all(found.values()) else None
