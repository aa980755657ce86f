"""What the engine is asked and what it answers."""

import dataclasses
from collections.abc import Container, Sequence
from typing import Literal, TypeAlias

from almost_jax.core.llama import LlamaConfig
from almost_jax.errors import InputError

Finish: TypeAlias = Literal["stop_token", "stop_string", "length"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt [tokens] to continue. Its samples depend on the seed and on `id`, so ids must differ.

    `max_new_tokens` is its own limit, at most the rules', which hold when it is None. With `keep` its cache stays when
    it has ended, for a later request whose `parent` it is; `Engine.forget` frees it.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int | None = None
    keep: bool = False
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was drawn for a request: tokens and the log-prob of each.

    The last token is the stop token, or the one that completed a stop string, where `finish` says so.
    """

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish

    @property
    def stopped(self) -> bool:
        """Whether a stop token was drawn."""
        return self.finish == "stop_token"

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.stopped else self.tokens


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the engine runs, which no request's tokens depend on.

    slots: B, requests that run at once. steps_per_wake: k, decoding steps between two looks of the host. refill:
    whether a slot takes the next request as soon as it is free; else all wait for the slowest, as in a plain batch.
    prefill_tokens: tokens of prompts that are read by one program, at most, unless one prompt is longer.
    """

    slots: int
    steps_per_wake: int
    refill: bool
    prefill_tokens: int

    def __post_init__(self) -> None:
        for name in ("slots", "steps_per_wake", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


def check_requests(
    requests: Sequence[Request], config: LlamaConfig, most: int, prefix: int, kept: Container[str]
) -> None:
    """Refuse requests that can't be continued.

    Args:
        requests: what is asked.
        config: the model's shape.
        most: the largest limit that a request may have, which is that of one without its own.
        prefix: tokens that stand before every prompt.
        kept: ids of the requests that another one may go on from.

    Raises:
        InputError: names the request and what is wrong with it.
    """
    seen: set[str] = set()
    for request in requests:
        name = f"request {request.id!r}"
        if request.id in seen:
            raise InputError(f"request id {request.id!r} is given twice: ids must differ, since samples depend on them")
        seen.add(request.id)
        if not request.prompt:
            raise InputError(f"{name} has an empty prompt; give it at least one token")
        limit = most if request.max_new_tokens is None else request.max_new_tokens
        if not 1 <= limit <= most:
            raise InputError(f"{name}: max_new_tokens {limit} must be 1 to {most}, which the rules allow")
        if request.parent is not None and request.parent not in kept:
            raise InputError(f"{name}: parent {request.parent!r} was not kept; ask for it with keep")
        needed = prefix + len(request.prompt) + limit
        if needed > config.max_position_embeddings:
            raise InputError(
                f"{name}: prefix {prefix} + prompt {len(request.prompt)} + max_new_tokens {limit} = {needed} exceed "
                f"the model's {config.max_position_embeddings} positions"
            )
        check_tokens(name, request.prompt, config.vocab_size)


def check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    """Refuse tokens outside the vocabulary.

    Raises:
        InputError: names what holds the token, and the token.
    """
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InputError(f"{name} holds token {token}, but the model's vocabulary is 0..{vocab_size - 1}")
