"""Dialogues as token ids: what reward models score, what fine-tuning learns from, what fine-tuned models are asked.

The text is that of `almost_jax.stages.templates`. Beginning and end of text are added here: a fine-tuned model's
assistant ends each of its turns by the end of text, and the next human turn follows.
"""

from collections.abc import Iterator, Sequence

from almost_jax.io.tokenizer import Tokenizer
from almost_jax.stages.templates import END_OF_TURN, Turn, query_prompt, render


def text_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A reward model's input: beginning of text (if the tokenizer has one), the text, end of text.

    The end of text is always the last token, so that even an empty response has a place where its score is read.
    """
    return [*tokenizer.begin, *tokenizer.encode(text.strip()), tokenizer.eos_id]


def dialogue_tokens(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """`text_tokens` of a dialogue, whose last turn is the response to score."""
    return text_tokens(tokenizer, render(turns))


def prompt_tokens(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """What a fine-tuned model is asked: the dialogue up to the label of the assistant's next turn.

    Args:
        tokenizer: the model's.
        turns: a dialogue that ends with a human turn.

    Returns:
        Token ids, beginning of text first.
    """
    tokens = tokenizer.begin
    for opening, response in _exchanges(turns):
        if response is None:
            tokens += tokenizer.encode(opening)
        else:
            tokens += [*tokenizer.encode(_closed(opening, response)), tokenizer.eos_id]
    return tokens


def training_tokens(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """A demonstration as fine-tuning sees it.

    Args:
        tokenizer: the model's.
        turns: a dialogue that ends with an assistant turn.

    Returns:
        Token ids, and for each of them whether it is a target: the assistant's words and the end of text behind each of
        its turns.
    """
    tokens = tokenizer.begin
    targets = [False] * len(tokens)
    for opening, response in _exchanges(turns):
        if response is None:
            raise ValueError("a demonstration must end with an assistant turn")
        asked, whole = tokenizer.encode(opening), tokenizer.encode(_closed(opening, response))
        shared = 0
        while shared < min(len(asked), len(whole)) and asked[shared] == whole[shared]:
            shared += 1
        tokens += [*whole, tokenizer.eos_id]
        targets += [False] * shared + [True] * (len(whole) - shared + 1)
    return tokens, targets


def _exchanges(turns: Sequence[Turn]) -> Iterator[tuple[str, str | None]]:
    """Split a dialogue behind each assistant turn: (text up to the assistant's label, its response or None)."""
    start, separator = 0, ""
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield separator + query_prompt(turns[start:place], "assistant"), turn["text"]
            start, separator = place + 1, END_OF_TURN
    if start < len(turns):
        yield separator + query_prompt(turns[start:], "assistant"), None


def _closed(opening: str, response: str) -> str:
    return f"{opening} {response}" if response else opening
