"""How a judge is asked about two answers and how its reply is read: two scores first, or a letter in double brackets.

The first is FastChat's prompt for the Vicuna questions and is built in; prompts of the second kind are read from a
`judge_prompts.jsonl` of FastChat's llm_judge (`pair-v2`, say).
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from almost_jax.errors import InputError
from almost_jax.evaluation.judge import SYSTEM, TEMPLATE, parse_scores
from almost_jax.io.records import read_records

LETTERS = "[[A]]"
_LETTER = re.compile(r"\[\[([ABC])\]\]")
_WINNERS = {"A": 1, "B": -1, "C": 0}


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """A prompt about a question and two answers.

    Attributes:
        name: of the prompt.
        system: what the judge is told first.
        template: what it is asked, with the places {question}, {answer_a} and {answer_b}.
        reads: whether the reply's first line holds two scores, or somewhere [[A]], [[B]] or [[C]] (a tie).
    """

    name: str
    system: str
    template: str
    reads: Literal["scores", "letters"]

    def messages(self, question: str, first: str, second: str) -> list[dict[str, str]]:
        """The chat that asks, `first` being shown first."""
        text = self.template.format(question=question, answer_a=first, answer_b=second)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]

    def read(self, reply: str) -> tuple[int | None, list[float] | None]:
        """Who is better in a reply: 1 the one shown first, -1 the other, 0 neither, None when it can't be told; scores.

        A reply with two different letters can't be told.
        """
        if self.reads == "scores":
            scores = parse_scores(reply)
            if scores is None:
                return None, None
            return int(scores[0] > scores[1]) - int(scores[0] < scores[1]), list(scores)
        letters = set(_LETTER.findall(reply))
        return (_WINNERS[letters.pop()] if len(letters) == 1 else None), None


SCORES = JudgePrompt(
    "scores", SYSTEM, TEMPLATE.replace("{first}", "{answer_a}").replace("{second}", "{answer_b}"), "scores"
)


def read_prompt(path: Path, name: str) -> JudgePrompt:
    """A pairwise prompt of a file of FastChat's: lines of {"name", "type", "system_prompt", "prompt_template", ...}.

    Raises:
        InputError: there is no such prompt, it isn't pairwise with [[A]] as its verdict, or it needs more than a
            question and two answers (references, further turns).
    """
    found = {str(record.get("name")): record for record in read_records(path)}
    if name not in found:
        raise InputError(f"{path}: has no prompt {name!r}; it has {', '.join(found) or 'none'}")
    record = found[name]
    if record.get("type") != "pairwise" or record.get("output_format") != LETTERS:
        raise InputError(
            f"{path}: prompt {name!r} is {record.get('type')!r} with {record.get('output_format')!r}; expected a "
            f"pairwise one with {LETTERS!r}"
        )
    texts = record.get("system_prompt"), record.get("prompt_template")
    if not isinstance(texts[0], str) or not isinstance(texts[1], str):
        raise InputError(f"{path}: prompt {name!r}: system_prompt and prompt_template must be texts")
    prompt = JudgePrompt(name, texts[0], texts[1], "letters")
    try:
        prompt.messages("", "", "")
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{path}: prompt {name!r} asks for {error}; only question, answer_a and answer_b can be filled in"
        ) from error
    return prompt
