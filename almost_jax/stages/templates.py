r"""Dialogues as plain text: the one format that prompts, fine-tuning and reward models share.

A dialogue is `"Human: {q}\n\nAssistant: {r}\n\nHuman: ..."`. A few-shot prompt is demonstrations in that format,
each turn ended by a blank line, so that a vanilla model takes the query for the next dialogue of the transcript. Files
may set dialogues apart by lines of dashes, which tell the model (and us) where one ends.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import yaml

from almost_jax.config import PromptedModel
from almost_jax.errors import InputError
from almost_jax.io.paths import local_path

Role: TypeAlias = Literal["human", "assistant"]


class Turn(TypedDict):
    """One turn of a dialogue."""

    role: Role
    text: str


LABELS: dict[Role, str] = {"human": "Human:", "assistant": "Assistant:"}
END_OF_TURN = "\n\n"
SEPARATOR = "-----"

# Our own labels open a turn at the beginning of a line or behind a sentence, others at the beginning of a line only.
_OTHERS = re.compile(
    r"(?:^|(?<=[.!?\"')\]\u201d])\s+)(?:Human|Assistant):"
    r"|^[#*>\s]*(?:Human|Assistant|User|AI(?:\s+Assistant)?|Bot|Chatbot|System)\s*(?:\*\*)?:",
    re.MULTILINE,
)
# The end of a sentence, closing quotes and brackets included; numbers of lists and usual abbreviations are none.
_SENTENCE = re.compile(
    r"(?<!\b[A-Za-z])(?<!\bMr)(?<!\bDr)(?<!\bMs)(?<!\bvs)(?<!\bMrs)(?<!\betc)(?<!^\d)(?<!^\d\d)"
    r"[.!?\u2026]+[\"'\u201d\u2019)\]*_`]*(?=\s|$)",
    re.MULTILINE,
)

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
    return "".join(render(dialogue) + END_OF_TURN for dialogue in _first(dialogues, shots))


def demonstrations_text(prompted: PromptedModel) -> str:
    """The few-shot prompt of a prompted model: the first `shots` dialogues, with what stands before and between them.

    Raises:
        InputError: the demonstrations are missing, malformed or fewer than the shots.
    """
    try:
        found = load_prompt(prompted.demonstrations)
        if not found.separated:
            return found.preamble + few_shot_prefix(found.dialogues, prompted.shots)
        shown = [f"{render(dialogue)}{END_OF_TURN}" for dialogue in _first(found.dialogues, prompted.shots)]
    except InputError as error:
        raise InputError(f"demonstrations {prompted.demonstrations!r}: {error}") from error
    line = f"{SEPARATOR}{END_OF_TURN}"
    return (f"{found.preamble}{line}" if found.preamble else "") + "".join(f"{one}{line}" for one in shown)


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """A file of dialogues: the text before them ("" or ended by a blank line), and whether lines part them."""

    preamble: str
    dialogues: list[list[Turn]]
    separated: bool


def load_demonstrations(name: str) -> list[list[Turn]]:
    """The dialogues of `load_prompt`."""
    return load_prompt(name).dialogues


def load_prompt(name: str) -> Demonstrations:
    """Read a file of dialogues.

    A yaml file has `dialogues: [{turns: [{human: "..."}, {assistant: "..."}]}]` and, if wanted, `preamble: "..."` and
    `separator: true`. A text file is in the format of the HHH prompt of Askell et al. 2021 (arXiv 2112.00861): an
    introduction, then dialogues with `Human:` and `Assistant:` before every turn, parted by lines of dashes. A last
    turn of the human's, which nobody answers, is left out.

    Args:
        name: `microworld:NAME` for the micro-world's own, NAME for a file of stages/prompts, or a path to a file.

    Raises:
        InputError: there is no such file, or it breaks the format; turns must alternate from the human to the
            assistant, who has the last word.
    """
    path = prompt_file(name)
    if path.suffix not in (".yaml", ".yml"):
        return _from_text(path)
    content = load_yaml(path)
    entries, preamble, separated = content.get("dialogues"), content.get("preamble", ""), content.get("separator")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: `dialogues` must be a list of dialogues with `turns`")
    if not isinstance(preamble, str):
        raise InputError(f"{path}: `preamble` must be a text, not {preamble!r}")
    if separated not in (None, True, False):
        raise InputError(f"{path}: `separator` must be true or false, not {separated!r}")
    dialogues = [_dialogue(entry, f"{path}: dialogue {number}") for number, entry in enumerate(entries, start=1)]
    return Demonstrations(_ended(preamble), dialogues, bool(separated))


def own_words(text: str) -> str:
    """A turn up to where it goes on as somebody else's.

    A vanilla model writes on after its turn, at times within the line, and at times under labels that it knows from
    elsewhere ("User:", "**AI:**"); none of them may stay.
    """
    match = _OTHERS.search(text)
    return text[: match.start()].rstrip() if match else text


def whole_sentences(text: str) -> str:
    """A text without the half sentence at its end.

    It ends with the last sentence, or with the last line that is complete (an item of a list, a row of a table) and
    announces nothing, whichever is later. A text without either stays as it is: half a sentence says more than nothing.
    """
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    breaks = [match.start() for match in re.finditer(r"\n", text)]
    ends += [place for place in breaks if not re.search(r"[:,;\-]\s*$", text[:place])]
    return text[: max(ends)].rstrip() if ends else text


def prompt_file(name: str) -> Path:
    """Where `microworld:NAME`, the NAME of a file in stages/prompts, or a path points to.

    Raises:
        InputError: there is no such file.
    """
    if name.startswith("microworld:"):
        folder, stem = _MICROWORLD, name.removeprefix("microworld:")
    elif name.endswith((".yaml", ".yml", ".jsonl", ".txt")) or "/" in name:
        path = local_path(name)
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
        InputError: it can't be read, is not valid yaml, or its top is something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as UTF-8 text ({error})") from error
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


def _from_text(path: Path) -> Demonstrations:
    """Dialogues in the HHH prompt's format."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as text ({error}); give a yaml or text file of dialogues") from error
    parts = re.split(r"^[ \t]*-{3,}[ \t]*$", text, flags=re.MULTILINE)
    label = re.compile(r"^(Human|Assistant):[ \t]*", re.MULTILINE)
    first = label.search(parts[0])
    preamble = parts[0][: first.start()] if first else parts[0]
    parts[0] = parts[0][len(preamble) :]
    dialogues: list[list[Turn]] = []
    for part in parts:
        if not part.strip():
            continue
        _, *pieces = label.split(part)
        entries = [{who.lower(): said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
        if entries and "human" in entries[-1]:
            entries.pop()
        dialogues.append(_dialogue({"turns": entries}, f"{path}: dialogue {len(dialogues) + 1}"))
    if not dialogues:
        raise InputError(f"{path}: holds no dialogue; each needs turns that begin with Human: and Assistant:")
    return Demonstrations(_ended(preamble), dialogues, len(parts) > 1)


def _ended(preamble: str) -> str:
    return preamble.strip() + END_OF_TURN if preamble.strip() else ""


def _first(dialogues: Sequence[Sequence[Turn]], shots: int) -> Sequence[Sequence[Turn]]:
    if shots > len(dialogues):
        raise InputError(f"shots: {shots} were asked for, but there are only {len(dialogues)} demonstrations")
    return dialogues[:shots]
