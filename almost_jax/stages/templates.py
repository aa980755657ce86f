r"""Dialogues as plain text: the one format that prompts, fine-tuning and reward models share.

A dialogue is `"Human: {q}\n\nAssistant: {r}\n\nHuman: ..."`. A few-shot prompt is demonstrations in that format,
each turn ended by a blank line, so that a vanilla model takes the query for the next dialogue of the transcript.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import yaml

from almost_jax.config import PromptedModel
from almost_jax.errors import InputError

Role: TypeAlias = Literal["human", "assistant"]


class Turn(TypedDict):
    """One turn of a dialogue."""

    role: Role
    text: str


LABELS: dict[Role, str] = {"human": "Human:", "assistant": "Assistant:"}
END_OF_TURN = "\n\n"

_PACKAGE = Path(__file__).resolve().parent.parent
_PROMPTS = _PACKAGE / "stages" / "prompts"
_MICROWORLD = _PACKAGE / "microworld" / "demonstrations"


def other(role: Role) -> Role:
    """Who speaks after `role`."""
    return "assistant" if role == "human" else "human"


def render(turns: Sequence[Turn]) -> str:
    """A dialogue as text, without a blank line at its end."""
    return END_OF_TURN.join(f"{LABELS[turn['role']]} {turn['text']}" for turn in turns)


def query_prompt(turns: Sequence[Turn], next_role: Role) -> str:
    """A dialogue up to the label of the next turn, without a space after it: the completion begins with one.

    Raises:
        ValueError: the last turn is already `next_role`'s.
    """
    if turns and turns[-1]["role"] == next_role:
        raise ValueError(f"the last turn is already the {next_role}'s; the next one must be the {other(next_role)}'s")
    return "".join(f"{LABELS[turn['role']]} {turn['text']}{END_OF_TURN}" for turn in turns) + LABELS[next_role]


def few_shot_prefix(dialogues: Sequence[Sequence[Turn]], shots: int) -> str:
    """The first `shots` dialogues as text, each turn ended by a blank line.

    Raises:
        InputError: there are fewer dialogues than shots.
    """
    if shots > len(dialogues):
        raise InputError(f"shots: {shots} were asked for, but there are only {len(dialogues)} demonstrations")
    return "".join(render(dialogue) + END_OF_TURN for dialogue in dialogues[:shots])


def demonstrations_text(prompted: PromptedModel) -> str:
    """The few-shot prompt of a prompted model.

    Raises:
        InputError: the demonstrations are missing, malformed or fewer than the shots.
    """
    try:
        return few_shot_prefix(load_demonstrations(prompted.demonstrations), prompted.shots)
    except InputError as error:
        raise InputError(f"demonstrations {prompted.demonstrations!r}: {error}") from error


def load_demonstrations(name: str) -> list[list[Turn]]:
    """Read a file of dialogues.

    Args:
        name: `microworld:NAME` for the micro-world's own, NAME for a file of stages/prompts, or a path to a yaml file
            `dialogues: [{turns: [{human: "..."}, {assistant: "..."}]}]`.

    Raises:
        InputError: there is no such file, or it breaks the format; turns must alternate from the human to the
            assistant, who has the last word.
    """
    path = prompt_file(name)
    entries = load_yaml(path).get("dialogues")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: `dialogues` must be a list of dialogues with `turns`")
    return [_dialogue(entry, f"{path}: dialogue {number}") for number, entry in enumerate(entries, start=1)]


def prompt_file(name: str) -> Path:
    """Where `microworld:NAME`, the NAME of a file in stages/prompts, or a path points to.

    Raises:
        InputError: there is no such file.
    """
    if name.startswith("microworld:"):
        folder, stem = _MICROWORLD, name.removeprefix("microworld:")
    elif name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise InputError(f"{name}: there is no such file")
        return path
    else:
        folder, stem = _PROMPTS, name
    path = folder / f"{stem}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise InputError(f"{name}: there is no {path}; the names known there are: {known or 'none'}")
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a yaml file whose top is a mapping.

    Raises:
        InputError: it is not valid yaml, or its top is something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: the top must be a mapping, not {type(content).__name__}")
    return content


def _dialogue(entry: Any, where: str) -> list[Turn]:
    """Check one entry of a file of dialogues and turn it into turns."""
    entries = entry.get("turns") if isinstance(entry, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: must be a mapping with a list of `turns`")
    turns: list[Turn] = []
    expected: Role = "human"
    for number, item in enumerate(entries, start=1):
        text = item.get(expected) if isinstance(item, dict) and len(item) == 1 else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}, turn {number}: must be `{expected}: text`, not {item!r}")
        turns.append({"role": expected, "text": text.strip()})
        expected = other(expected)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: must end with the assistant's turn")
    return turns
