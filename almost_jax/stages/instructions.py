"""Requests as numbered lists: seeds, the prompt, what a vanilla model makes of it, and which requests are usable.

Source: Wang et al., Self-Instruct (2023).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from almost_jax.config import SelfInstructConfig
from almost_jax.errors import InputError
from almost_jax.io.records import Record, read_records
from almost_jax.stages.templates import load_yaml, prompt_file

Rejection: TypeAlias = Literal[
    "unfinished",
    "malformed",
    "too_short",
    "too_long",
    "no_request",
    "not_text",
    "missing_input",
    "duplicate",
    "near_duplicate",
]
REJECTIONS: tuple[Rejection, ...] = (
    "unfinished",
    "malformed",
    "too_short",
    "too_long",
    "no_request",
    "not_text",
    "missing_input",
    "duplicate",
    "near_duplicate",
)

# A number that opens a list item: "9.", "9)", "(9)", "9:", "#9.", "Task 9:", "Request 9.".
_NUMBER = r"(?:(?:task|request|instruction|question)\s+)?[(#]?(?P<number>\d{1,3})\s?[.):\]]+"
_ITEM = re.compile(rf"^\s*(?:[-*\u2022]\s+)?{_NUMBER}(?:\s+|$)(?P<text>.*)$", re.IGNORECASE)
# A vanilla model sometimes goes on to answer; the answer is no part of the request.
_ANSWER = re.compile(r"^\s*(?:answer|output|response|solution|a|assistant|ai)\s*:", re.IGNORECASE)
# A list goes on when its next number is the same (a slip) or a little higher.
_LARGEST_STEP = 3

# What makes a text a request: it asks, or one of its sentences begins with what is to be done. A vanilla model also
# writes statements and answers into its lists.
_ASKS = re.compile(
    r"""[?\u00bf] | ^\W*(?:what | who | whose | which | why | how | is | are | do | does | did | can | should)\b | \b(?:
        please | (?:can | could | would | will)\s+you | help\s+me | i\s+(?:need | want | would\s+like | have\s+to)
      | i'd\s+like | i'm\s+looking\s+for | (?:your | in\s+this)\s+task | given\s+an? | you\s+(?:need | have)\s+to
      | you\s+(?:are | will\s+be)\s+(?:given | asked | provided) | tell\s+me | let's | come\s+up\s+with | point\s+out
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
_VERBS = """
    adapt add advise analyse analyze answer argue arrange assign assume brainstorm build calculate categorise
    categorize change check choose cite classify combine comment compare complete compose compute conclude
    condense consider construct continue contrast convert convince correct count create criticise criticize
    critique debate debug decide decode define delete derive describe design detect determine develop devise
    differentiate discuss distinguish do draft edit elaborate encode estimate evaluate examine expand explain
    explore express extend extract fact-check fill find fix form format formulate generate give go group guess
    guide highlight identify illustrate imagine implement improve infer insert interpret introduce invent judge
    justify label link list make match mention model modify name narrate negate offer optimise optimize order
    organise organize outline output paraphrase persuade pick plan predict prepare present pretend print produce
    proofread propose prove provide put quote rank rate rearrange recite recommend rectify reduce refactor
    reflect remove reorder rephrase replace reply report respond restate return reverse review revise rewrite
    role-play round say select share shorten show simplify simulate solve sort speak specify spell split state
    structure study suggest sum summarise summarize suppose swap take talk teach tell think transform translate
    trim try turn understand unscramble use verify walk weigh wish word work write
""".split()
_TELLS = re.compile(
    rf"""(?:^\W*|[.!:;\n]["'\u201d]?\s+|,\s+(?:and\s+|then\s+)?)
    (?:(?:then|now|also|first|next|briefly|kindly|in\s+\w+(?:\s+\w+)?,?)\s+)?(?:{"|".join(_VERBS)})\b""",
    re.IGNORECASE | re.VERBOSE,
)

# What can't be shown to, or done by, something that reads and writes text only.
_NOT_TEXT = re.compile(
    r"""\b(?:
        images? | pictures? | photos? | photographs? | screenshots? | videos? | audio | podcasts? | recordings?
      | graphs? | charts? | diagrams? | flow\s?charts? | maps? | figures?\s+(?:above|below|\d)
      | (?:a|an|the|this|that|these|my|your)\s+(?:\w+\s+)?files? | attachments? | attached
      | downloads? | uploads? | spreadsheets? | pdfs?
      | links? | urls? | web\s?sites? | web\s?pages? | click | browse | go\s+to
      | draw | sketch | sing\s+(?:me|a|the) | play\s+(?:me|a\s+song|the\s+song|some) | call\s+me
      | e-?mail\s+me | remind\s+me
    )\b | https?:// | \bwww\.""",
    re.IGNORECASE | re.VERBOSE,
)
# "Summarize the following article." with no article to follow.
_POINTS_AHEAD = re.compile(
    r"\b(?:the\s+)?following\b|\b(?:article|text|passage|paragraph|list|table|code)\s+below\b|\bgiven\s+(?:text|passage|"
    r"article|paragraph|sentence|list|table|input|data)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A request that the model wrote; `complete` is False if the token budget cut it off."""

    text: str
    complete: bool


def load_instructions(name: str) -> list[str]:
    """The requests of a yaml file `instructions: ["...", ...]`, or of a jsonl file.

    A line of a jsonl file has its request in `text`, `instruction` (Self-Instruct's seed tasks, with the `input` of the
    first of their `instances` behind it), or as the first of its `turns` (Vicuna's questions).

    Args:
        name: the name of a file in stages/prompts, or a path.

    Raises:
        InputError: the file is missing, breaks the format, or has a request twice.
    """
    path = prompt_file(name)
    if path.suffix == ".jsonl":
        places = [(f"record {number}", _request(record)) for number, record in enumerate(read_records(path), start=1)]
    else:
        entries = load_yaml(path).get("instructions")
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{path}: `instructions` must be a list of texts")
        places = [(f"instruction {number}", entry) for number, entry in enumerate(entries, start=1)]
    for place, entry in places:
        if not isinstance(entry, str) or not entry.strip():
            raise InputError(f"{path}: {place} must be a text, not {entry!r}")
    found = [" ".join(entry.split()) if path.suffix != ".jsonl" else entry.strip() for _, entry in places]
    twice = [text for text, count in Counter(found).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {twice[0]!r} stands there {found.count(twice[0])} times; once is right")
    return found


def _request(record: Record) -> Any:
    """The request of a line of a jsonl file; None if there is none."""
    if "turns" in record and isinstance(record["turns"], list):
        return next(iter(record["turns"]), None)
    text = record.get("text", record.get("instruction"))
    instances = record.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else {}
    given = first.get("input") if isinstance(first, dict) else None
    return f"{text}\n\n{given}" if isinstance(text, str) and given else text


def list_prompt(examples: Sequence[str]) -> str:
    """A numbered list of requests that ends with the number of the next one."""
    lines = [f"{number}. {text}" for number, text in enumerate(examples, start=1)]
    return "\n".join([*lines, f"{len(examples) + 1}."])


def parse_list(completion: str, first: int, finished: bool) -> list[Candidate]:
    """The requests in what a vanilla model wrote after "{first}.".

    Numbers may be dressed differently ("10)", "(10)", "Task 10:"), repeat or skip a little, and stand inside a line
    after the end of a sentence. The list ends where the numbers fall back or jump, and at a blank line that no number
    follows; an answer that the model adds to a request is dropped.

    Args:
        completion: the text after the number.
        first: the number that the prompt ended with.
        finished: whether the model ended by itself; otherwise the last request is incomplete.

    Returns:
        Requests in order, white space collapsed, quotes and asterisks around a whole request taken off. Empty ones are
        kept, so that they can be counted.
    """
    items, ended = _items(completion, first)
    last = len(items) - 1
    return [
        Candidate(_bare(" ".join(" ".join(lines).split())), finished or ended or index < last)
        for index, lines in enumerate(items)
    ]


def reject(candidate: Candidate, config: SelfInstructConfig) -> Rejection | None:
    """The first reason against a request, looking at it alone; None if there is none.

    Args:
        candidate: a parsed request.
        config: the bounds on its number of words.
    """
    text = candidate.text
    words = text.split()
    if not candidate.complete:
        return "unfinished"
    if not re.match(r"[\"'(\w\u00bf\u00a1]", text) or not re.search(r"[^\W\d_]", text) or text.startswith("_"):
        return "malformed"
    if len(words) < config.min_words:
        return "too_short"
    if len(words) > config.max_words:
        return "too_long"
    if not (_ASKS.search(text) or _TELLS.search(text)):
        return "no_request"
    if _NOT_TEXT.search(text):
        return "not_text"
    if text.endswith((":", "...", "\N{HORIZONTAL ELLIPSIS}")) or (_POINTS_AHEAD.search(text) and not _has_input(text)):
        return "missing_input"
    return None


def _items(completion: str, first: int) -> tuple[list[list[str]], bool]:
    """The lines of every item, and whether something other than the text's end ended the list."""
    items: list[list[str]] = [[]]
    number, answered, blank = first, False, False
    for position, line in enumerate(_split_inline(completion, first).split("\n")):
        match = _ITEM.match(line) if position else None
        if match:
            found = int(match["number"])
            if not number <= found <= number + _LARGEST_STEP:
                return items, True
            items.append([match["text"]])
            number, answered, blank = found, False, False
        elif not line.strip():
            # The model may put its first request on the line after the number.
            blank = blank or bool("".join(items[-1]).strip())
        elif blank:
            return items, True
        else:
            answered = answered or bool(_ANSWER.match(line))
            if not answered:
                items[-1].append(line)
    return items, False


def _split_inline(text: str, first: int) -> str:
    """Put numbers that go on counting within a line, after the end of a sentence, on lines of their own."""
    number = first + 1
    position = 0
    while match := re.compile(rf"(?<=[.?!\"'])[ \t]+(?={number}[.)]\s)").search(text, position):
        text = text[: match.start()] + "\n" + text[match.end() :]
        position = match.start()
        number += 1
    return text


def _bare(text: str) -> str:
    """Take off quotes or asterisks that enclose the whole text."""
    for mark, close in (("**", "**"), ('"', '"'), ("\u201c", "\u201d"), ("*", "*")):
        inner = text[len(mark) : -len(close)]
        if text.startswith(mark) and text.endswith(close) and inner and mark not in inner and close not in inner:
            return inner.strip()
    return text


def _has_input(text: str) -> bool:
    """Whether a request that points ahead brings its material: something after a colon, or in quotes or brackets."""
    return bool(re.search(r":\s*\S", text) or re.search(r"[\"\u201c(\[{].{3,}[\"\u201d)\]}]", text))
