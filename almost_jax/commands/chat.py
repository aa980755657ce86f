"""almost-jax chat: a dialogue with a model on a terminal, its words shown as they are drawn."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import jax
import typer
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from almost_jax.commands.places import DtypeOption, MeshOption, SeedOption, check_dtype, one_device, parse_mesh
from almost_jax.commands.terminal import harmless, spoken
from almost_jax.core.llama import LlamaConfig, Params
from almost_jax.core.partitioning import exact_products
from almost_jax.errors import InputError
from almost_jax.io.models import Model, load_model
from almost_jax.io.transfer import GENERATION, locate
from almost_jax.sampling.keys import request_key
from almost_jax.sampling.layout import decode_layout
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.streaming import stream
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.templates import LABELS, Turn

# Prompts and caches are padded to a multiple of it.
_MULTIPLE = 128
HELP = """/new      forget the dialogue
/retry    answer the last question again, with other chances
/set      show the settings; /set NAME VALUE changes temperature, top-p, top-k or max-new-tokens
/quit     leave; so does the end of the input (Ctrl-D)
Ctrl-C    stops an answer"""
SETTINGS = {"temperature": float, "top-p": float, "top-k": int, "max-new-tokens": int}


@dataclasses.dataclass
class Chat:
    """A dialogue so far, and with what it goes on.

    Attributes:
        model: who answers.
        params, config: its tree, laid out to decode with.
        mesh: where it runs.
        rules: how answers are drawn.
        seed: with the number of the answer, the source of all chance.
        system: what a chat template is told first; None for nothing.
        plain: whether the dialogue is Human and Assistant, and not the tokenizer's own template.
        turns: what was said.
        drawn: how many answers have been begun.
    """

    model: Model
    params: Params
    config: LlamaConfig
    mesh: Mesh
    rules: SamplingRules
    seed: int
    system: str | None
    plain: bool
    turns: list[Turn] = dataclasses.field(default_factory=list)
    drawn: int = 0

    def answer(self, question: str) -> Iterator[str]:
        """Answer; what was given is remembered even if the caller leaves off.

        Yields:
            Pieces of text, raw: a terminal must not be given them as they are.

        Raises:
            InputError: the question alone is too long for the model; it is not remembered.
        """
        turns: list[Turn] = [*self.turns, {"role": "human", "text": question}]
        prompt = self._prompt(turns)
        # A model of few positions would forget everything for answers that it rarely gives: half is for what was said.
        wanted = min(self.rules.max_new_tokens, self.config.max_position_embeddings // 2)
        while len(prompt) + wanted > self.config.max_position_embeddings and len(turns) > 1:
            # The oldest question and its answer.
            turns = turns[2:]
            prompt = self._prompt(turns)
        room = self.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise InputError(f"{len(prompt)} tokens; the model reads {self.config.max_position_embeddings}")
        rules = dataclasses.replace(self.rules, max_new_tokens=min(room, self.rules.max_new_tokens))
        pieces: list[str] = []
        stops = (f"\n{LABELS['human']}",) if self.plain else ()
        try:
            with jax.set_mesh(self.mesh), exact_products(self.config.dtype):
                ids = stream(self.params, self.config, prompt, rules, self._key(), multiple=_MULTIPLE)
                for piece in spoken(self.model.tokenizer, ids, stops):
                    pieces.append(piece)
                    yield piece
        finally:
            self.turns = [*turns, {"role": "assistant", "text": "".join(pieces).strip()}]

    def _key(self) -> Array:
        self.drawn += 1
        return request_key(self.seed, f"chat/{self.drawn}")

    def _prompt(self, turns: list[Turn]) -> list[int]:
        if self.plain:
            return prompt_tokens(self.model.tokenizer, turns)
        names = {"human": "user", "assistant": "assistant"}
        messages = [{"role": names[turn["role"]], "content": turn["text"]} for turn in turns]
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.model.tokenizer.encode_chat(messages)


def chat_command(
    model: Annotated[str, typer.Option(help="A model of ours, a Hugging Face folder or hub name, or a GGUF file.")],
    ask: Annotated[str | None, typer.Option(help="Answer this one question and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first, by its own chat template.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set that holds this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 from all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    seed: SeedOption = 0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Human and Assistant, whatever the tokenizer's template.")
    ] = False,
    dtype: DtypeOption = "float32",
    mesh: MeshOption = None,
) -> None:
    """Talk to a model: its words appear as they are drawn, and can't drive the terminal."""
    check_dtype(dtype)
    settings = {"temperature": temperature, "top-p": top_p, "top-k": top_k, "max-new-tokens": max_new_tokens}
    console = Console(highlight=False)
    chat = open_chat(model, mesh, dtype, settings, seed, system, plain)
    if ask is not None:
        _say(console, chat.answer(ask))
        return
    _greet(console, chat, model)
    for line in _lines(console):
        if line.startswith("/"):
            if not _obey(console, chat, line):
                return
        elif line:
            _reply(console, chat, line)


def open_chat(
    source: str,
    mesh: str | None,
    dtype: str,
    settings: dict[str, float],
    seed: int,
    system: str | None,
    plain: bool,
) -> Chat:
    """Load a model to talk to.

    Raises:
        InputError: it can't be loaded, is a reward model, or a setting is out of range.
    """
    folder = locate(source)
    place = one_device() if mesh is None else parse_mesh(mesh)
    model = load_model(folder, place, dtype)
    if model.kind != "policy":
        raise InputError(f"model {source!r}: a reward model says nothing; expected a language model")
    plain = plain or not model.tokenizer.has_chat_template
    if plain and system is not None:
        raise InputError("--system: the plain dialogue has no place for it; the model must bring a chat template")
    params, config = decode_layout(model.params, model.config, place.devices.flat[0].platform)
    rules = sampling_rules(settings, ends(model, folder))
    return Chat(model, params, config, place, rules, seed, system, plain)


def sampling_rules(settings: Mapping[str, float], ends: tuple[int, ...]) -> SamplingRules:
    """The rules of options by their names.

    Raises:
        InputError: one is out of bounds.
    """
    try:
        return SamplingRules(
            float(settings["temperature"]),
            float(settings["top-p"]),
            int(settings["top-k"]),
            int(settings["max-new-tokens"]),
            ends,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def ends(model: Model, folder: str) -> tuple[int, ...]:
    """The tokens that end a turn: the tokenizer's, and those that a model's generation config lists."""
    found = [model.tokenizer.eos_id]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        listed = json.loads((Path(folder) / GENERATION).read_bytes()).get("eos_token_id")
        found += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(one for one in found if type(one) is int and 0 <= one < model.config.vocab_size))


def _greet(console: Console, chat: Chat, name: str) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(chat.model.params))
    kind = "plain dialogue" if chat.plain else "its own chat template"
    console.rule(style="dim")
    _print(console, f"{name}: {count:,} parameters, {kind}. /help says what can be asked of the chat itself.", "dim")


def _lines(console: Console) -> Iterator[str]:
    """What the user writes, line by line; ends with the input, or Ctrl-C where nothing is being said."""
    if sys.stdin.isatty():
        # Lines can then be edited and called back.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            # Asked for in plain letters: a prompt with colours confuses the editing of lines.
            line = input("\n> " if console.is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            if console.is_terminal:
                console.print()
            return
        yield line.strip()


def _reply(console: Console, chat: Chat, question: str) -> None:
    try:
        _say(console, chat.answer(question))
    except InputError as error:
        _print(console, str(error), "red")


def _say(console: Console, pieces: Iterator[str]) -> None:
    """Show an answer as it comes; Ctrl-C ends it."""
    try:
        for piece in pieces:
            console.print(harmless(piece), end="", style="cyan", markup=False, emoji=False, soft_wrap=True)
            console.file.flush()
    except KeyboardInterrupt:
        console.print(" (stopped)", end="", style="dim")
    console.print()


def _obey(console: Console, chat: Chat, line: str) -> bool:
    """Do what a line with a slash says; whether the chat goes on."""
    name, *rest = line.split()
    if name in ("/quit", "/exit"):
        return False
    if name == "/new":
        chat.turns = []
        _print(console, "forgotten", "dim")
    elif name == "/retry" and len(chat.turns) > 1:
        question = chat.turns[-2]["text"]
        chat.turns = chat.turns[:-2]
        _reply(console, chat, question)
    elif name == "/retry":
        _print(console, "nothing was asked yet", "dim")
    elif name == "/set":
        _change(console, chat, rest)
    else:
        _print(console, HELP, "dim")
    return True


def _change(console: Console, chat: Chat, words: list[str]) -> None:
    rules = chat.rules
    settings: dict[str, float] = {
        "temperature": rules.temperature,
        "top-p": rules.top_p,
        "top-k": rules.top_k,
        "max-new-tokens": rules.max_new_tokens,
    }
    if words:
        try:
            name, value = words
            settings[name] = SETTINGS[name](value)
            changed, _ = sampling_rules(settings, rules.stop_tokens), _shown(settings)
        except InputError as error:
            _print(console, str(error), "red")
            return
        except (KeyError, ValueError, OverflowError):
            _print(console, f"expected one of {', '.join(SETTINGS)} and a number", "red")
            return
        chat.rules = changed
    _print(console, _shown(settings), "dim")


def _shown(settings: Mapping[str, float]) -> str:
    """Settings by name; OverflowError for a number that is too large to be written."""
    return "  ".join(f"{name} {value:g}" for name, value in settings.items())


def _print(console: Console, text: str, style: str) -> None:
    console.print(harmless(text), style=style, markup=False, emoji=False, soft_wrap=True)
