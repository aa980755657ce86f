"""Ask a model for the next turn of many dialogues: responses, self-play and evaluation go through here."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from almost_jax.config import SamplingConfig
from almost_jax.io.models import Model
from almost_jax.io.tokenizer import Tokenizer
from almost_jax.sampling.engine import Completion, Request, generate
from almost_jax.sampling.sampler import SamplingRules
from almost_jax.stages.dialogues import prompt_tokens
from almost_jax.stages.templates import LABELS, SEPARATOR, Role, Turn, own_words, query_prompt, whole_sentences

# Prompts are padded to a multiple of this many tokens, so that few shapes are compiled.
PROMPT_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class DialogueRequest:
    """A dialogue that waits for its next turn; its id decides the randomness, so it must be unique in a call."""

    id: str
    turns: Sequence[Turn]


@dataclasses.dataclass(frozen=True)
class Reply:
    """The next turn, stripped. `tokens` counts what `text` took; `finish` is "length" if the budget ran out first."""

    id: str
    text: str
    tokens: int
    finish: Literal["stop", "length"]


def respond(
    model: Model,
    demonstrations_text: str,
    requests: Sequence[DialogueRequest],
    *,
    next_role: Role,
    sampling: SamplingConfig,
    seed: int,
) -> Iterator[Reply]:
    """Sample the next turn of every dialogue.

    A vanilla model (one with demonstrations) ends its turn by going on with the next speaker's label, by the line that
    parts dialogues if its prompt has such lines, or by the end of text; a fine-tuned one (without) by the end of text
    alone, and nothing that it writes is cut off.

    Args:
        model: a policy.
        demonstrations_text: the few-shot prompt, "" for a fine-tuned model.
        requests: the dialogues, whose last turn must not be `next_role`'s.
        next_role: who speaks next.
        sampling: how tokens are drawn.
        seed: with a request's id it decides the request's tokens, whatever else is generated.

    Returns:
        The replies in the order of the requests, as batches finish.

    Raises:
        InputError: a prompt and its longest response do not fit into the model's positions.
    """
    tokenizer = model.tokenizer
    vanilla = bool(demonstrations_text)
    if vanilla:
        prefix = _bos(tokenizer) + tokenizer.encode(demonstrations_text)
        prompts = [tokenizer.encode(query_prompt(request.turns, next_role)) for request in requests]
    elif next_role == "assistant":
        # As in fine-tuning: the end of text stands behind every earlier turn of the assistant.
        prefix, prompts = [], [prompt_tokens(tokenizer, request.turns) for request in requests]
    else:
        raise ValueError("a fine-tuned model knows the assistant's turns alone; give demonstrations for the human's")
    stops = stop_strings(demonstrations_text) if vanilla else ()
    rules = sampling_rules(sampling, stop_tokens(tokenizer, stops))
    completions = generate(
        model.params,
        model.config,
        [Request(request.id, tuple(prompt)) for request, prompt in zip(requests, prompts, strict=True)],
        rules,
        seed=seed,
        prefix_tokens=prefix,
        batch_size=sampling.batch_size,
        prompt_multiple=PROMPT_MULTIPLE,
    )
    for completion in completions:
        yield reply(tokenizer, completion, stops, vanilla and sampling.trim_unfinished)


def sampling_rules(sampling: SamplingConfig, stop_tokens: tuple[int, ...]) -> SamplingRules:
    """The sampler's rules for a config and the tokens that end a completion."""
    return SamplingRules(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_new_tokens,
        stop_tokens=stop_tokens,
    )


def stop_strings(demonstrations_text: str) -> tuple[str, ...]:
    """What ends a vanilla model's turn: a speaker's label, or the line that parts dialogues where the prompt has it."""
    labels = tuple(f"\n{label}" for label in LABELS.values())
    return (*labels, f"\n{SEPARATOR}") if f"\n{SEPARATOR}\n" in demonstrations_text else labels


def stop_tokens(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[int, ...]:
    """The end of text, and every stop string that is one token (without its line break)."""
    single = [tokenizer.single_token(stop.strip()) for stop in stops]
    return tuple(sorted({tokenizer.eos_id, *(token for token in single if token is not None)}))


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
    stopped = completion.stopped or found or text != whole
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


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
