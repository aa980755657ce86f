"""Ask a model for the next turn of many dialogues: responses, self-play and evaluation go through here."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from almost_jax.config import SamplingConfig
from almost_jax.errors import InputError
from almost_jax.io.models import Model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.engine import Completion, Engine, Request, Settings, in_order
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.stats import Stats
from almost_jax.sampling.stops import StopStrings
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.templates import LABELS, SEPARATOR, Role, Turn, own_words, query_prompt, whole_sentences

# Texts that are scored are padded to a multiple of this many tokens, so that few shapes are compiled.
PROMPT_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class DialogueRequest:
    """A dialogue that waits for its next turn; its id decides the randomness, so it must be unique in a call.

    `keep` and `parent` are `Request`'s: a dialogue that is to go on keeps what was read of it.
    """

    id: str
    turns: Sequence[Turn]
    keep: bool = False
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """The next turn, stripped. `tokens` counts what `text` took; `finish` is "length" if the budget ran out first."""

    id: str
    text: str
    tokens: int
    finish: Literal["stop", "length"]


class Responder:
    """A model that gives the next turn of dialogues; what it shares between them is computed once.

    A vanilla model (one with demonstrations) ends its turn by going on with the next speaker's label, by the line that
    parts dialogues if its prompt has such lines, or by the end of text; a fine-tuned one (without) by the end of text
    alone, and nothing that it writes is cut off.
    """

    def __init__(
        self, model: Model, demonstrations_text: str, *, next_role: Role, sampling: SamplingConfig, seed: int
    ):
        """For a policy.

        Args:
            model: a policy.
            demonstrations_text: the few-shot prompt, "" for a fine-tuned model.
            next_role: who speaks next.
            sampling: how tokens are drawn.
            seed: with a request's id it decides the request's tokens, whatever else is generated.
        """
        tokenizer = self._tokenizer = model.tokenizer
        self._vanilla, self._role = bool(demonstrations_text), next_role
        if not self._vanilla and next_role != "assistant":
            raise ValueError("a fine-tuned model knows only the assistant's turns; give demonstrations for the human's")
        self._stops = stop_strings(demonstrations_text) if self._vanilla else ()
        self._trim = self._vanilla and sampling.trim_unfinished
        prefix = tokenizer.begin + tokenizer.encode(demonstrations_text) if self._vanilla else []
        self._positions, self._taken = model.config.max_position_embeddings, len(prefix) + sampling.max_new_tokens
        self._group = group_size(sampling)
        self._needs = f"few-shot prompt {len(prefix)} + max_new_tokens {sampling.max_new_tokens}"
        self._engine = Engine(
            model.params,
            model.config,
            sampling_rules(sampling, stop_tokens(tokenizer, self._stops)),
            engine_settings(sampling),
            seed=seed,
            prefix_tokens=prefix,
            stops=spanning_stops(tokenizer, self._stops),
        )

    def fits(self, turns: Sequence[Turn]) -> bool:
        """Whether a dialogue and its longest next turn fit into the model's positions."""
        return self._has_room(self._prompt(turns))

    def respond(self, requests: Sequence[DialogueRequest]) -> Iterator[Reply]:
        """Sample the next turn of every dialogue, whose last turn must not be the responder's own.

        Returns:
            The replies in the order of the requests, as they finish.

        Raises:
            InputError: a dialogue and its longest next turn don't fit into the model's positions; nothing was sampled.
        """
        return self._sampled(self._checked(requests))

    def respond_where_it_fits(self, requests: Sequence[DialogueRequest]) -> Iterator[Reply | None]:
        """`respond`, with None where a dialogue and its longest next turn don't fit."""
        asked = self._encoded(requests)
        fits = [self._has_room(one.prompt) for one in asked]
        replies = self._sampled([one for one, fit in zip(asked, fits, strict=True) if fit])
        return (next(replies) if fit else None for fit in fits)

    def respond_from(self, requests: Sequence[DialogueRequest], already: int) -> Iterator[Reply]:
        """`respond`, group by group, to the requests behind the first `already`, which have their replies."""
        asked = self._checked(requests)
        for start in range(already // self._group * self._group, len(asked), self._group):
            for place, found in enumerate(self._sampled(asked[start : start + self._group]), start=start):
                if place >= already:
                    yield found

    def too_long(self, turns: Sequence[Turn]) -> str:
        """What to say of a dialogue that doesn't fit."""
        length = len(self._prompt(turns))
        return (
            f"{turns[-1]['text'][:60]!r}: {self._needs} + dialogue {length} = {self._taken + length} tokens exceed the "
            f"model's {self._positions} positions; shorten or drop the query, or lower max_new_tokens or the shots"
        )

    @property
    def stats(self) -> Stats:
        """What it has sampled so far, and how fast."""
        return self._engine.stats

    def forget(self, ids: Iterable[str] | None = None) -> None:
        """Free what was kept of some requests, or of all."""
        self._engine.forget(ids)

    def _checked(self, requests: Sequence[DialogueRequest]) -> list[Request]:
        """The requests in tokens; one that doesn't fit is refused, with what it takes and what there is."""
        asked = self._encoded(requests)
        for one, request in zip(asked, requests, strict=True):
            if not self._has_room(one.prompt):
                raise InputError(f"request {request.id!r}: {self.too_long(request.turns)}")
        return asked

    def _encoded(self, requests: Sequence[DialogueRequest]) -> list[Request]:
        """The requests in tokens; a dialogue that many of them go on from is encoded once."""
        prompts = {id(one.turns): one.turns for one in requests}
        known = {place: self._prompt(turns) for place, turns in prompts.items()}
        return [Request(one.id, known[id(one.turns)], keep=one.keep, parent=one.parent) for one in requests]

    def _sampled(self, asked: Sequence[Request]) -> Iterator[Reply]:
        done = in_order(asked, self._engine.run(asked))
        return (reply(self._tokenizer, one, self._stops, self._trim) for one in done)

    def _has_room(self, prompt: Sequence[int]) -> bool:
        return self._taken + len(prompt) <= self._positions

    def _prompt(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        if self._vanilla:
            return tuple(self._tokenizer.encode_behind(query_prompt(turns, self._role), plain=True))
        # As in fine-tuning: the end of text stands behind every earlier turn of the assistant.
        return tuple(prompt_tokens(self._tokenizer, turns))


def sampling_rules(sampling: SamplingConfig, stop_tokens: tuple[int, ...]) -> SamplingRules:
    """The sampler's rules for a config and the tokens that end a completion."""
    return SamplingRules(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        stop_tokens=stop_tokens,
    )


def group_size(sampling: SamplingConfig) -> int:
    """How many requests are answered together.

    A stopped stage repeats a torn group from its beginning, so that every request runs in the company, and by the
    programs, in which it would have run.
    """
    return sampling.group_batches * sampling.batch_size


def engine_settings(sampling: SamplingConfig) -> Settings:
    """How the engine runs, by a config."""
    return Settings(
        slots=sampling.batch_size,
        steps_per_wake=sampling.steps_per_wake,
        refill=sampling.refill,
        prefill_tokens=sampling.prefill_tokens,
    )


def stop_strings(demonstrations_text: str) -> tuple[str, ...]:
    """What ends a vanilla model's turn: a speaker's label, or the line that parts dialogues where the prompt has it."""
    labels = tuple(f"\n{label}" for label in LABELS.values())
    return (*labels, f"\n{SEPARATOR}") if f"\n{SEPARATOR}\n" in demonstrations_text else labels


def stop_tokens(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[int, ...]:
    """The end of text, and every stop string that is one token without its line break, where texts don't hold it whole.

    Where they do a token isn't enough to go by: five dashes stop a turn at the beginning of a line alone.
    """
    single = [tokenizer.single_token(stop.strip()) for stop in stops if not _is_read(tokenizer, stop)]
    return tuple(sorted({tokenizer.eos_id, *(token for token in single if token is not None)}))


def spanning_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> StopStrings | None:
    """The stop strings that `stop_tokens` has no token for, as the engine looks for them; None when there is none.

    The text's beginning counts as the beginning of a line, as in `cut`.
    """
    known = stop_tokens(tokenizer, stops)
    spanning = tuple(stop for stop in stops if tokenizer.single_token(stop.strip()) not in known)
    if not spanning:
        return None
    return StopStrings(spanning, lambda tokens: "\n" + tokenizer.decode(list(tokens)))


def _is_read(tokenizer: Tokenizer, stop: str) -> bool:
    """Whether a stop string comes back from the tokens of a text that holds it: some tokenizers drop line breaks."""
    return stop in tokenizer.decode_exactly(tokenizer.encode(f"a\n{stop} b"))


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text before the earliest stop string, wherever tokens begin and end.

    The text's beginning counts as the beginning of a line, so that a turn which is nothing but the next speaker's
    label comes out empty.

    Returns:
        The stripped text before it, and whether there was one.
    """
    lined = "\n" + text
    found = [position for position in (lined.find(stop) for stop in stops) if position >= 0]
    return (lined[: min(found)].strip(), True) if found else (text.strip(), False)


def reply(tokenizer: Tokenizer, completion: Completion, stops: Sequence[str], trim: bool) -> Reply:
    """Turn a completion's tokens into a turn.

    Args:
        tokenizer: the model's.
        completion: what it wrote; the stop token goes.
        stops: the text ends before the first of these, and before any label of somebody else; none for a fine-tuned
            model.
        trim: whether a half sentence at the end of a turn that ran out of tokens goes too.
    """
    tokens = list(completion.content)
    whole, found = cut(tokenizer.decode(tokens), stops)
    text = own_words(whole) if stops else whole
    stopped = completion.finish != "length" or found or text != whole
    if trim and not stopped:
        text = whole_sentences(text)
    if found or text != whole:
        tokens = tokens[: _tokens_of(tokenizer, tokens, text)]
    return Reply(completion.id, text, len(tokens), "stop" if stopped else "length")


def _tokens_of(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> int:
    """How many of the tokens it takes to spell `text`, the beginning of what they decode to."""
    if not text:
        return 0
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(tokens[:middle])) >= len(text):
            high = middle
        else:
            low = middle + 1
    return low
