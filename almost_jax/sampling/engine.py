"""Many requests over one model: fixed batches, one shared prefix, a key of its own for every request."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from almost_jax.core.llama import LlamaConfig, Params, Prefix, prefill_prefix
from almost_jax.errors import InputError
from almost_jax.sampling.padding import pad_batch
from almost_jax.sampling.rules import SamplingRules
from almost_jax.sampling.sampler import decode_layout, sample

_prefill_prefix = jax.jit(prefill_prefix, static_argnames="config")


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt [tokens] to continue. Its samples depend on the seed and on `id`, so ids must differ."""

    id: str
    prompt: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was drawn for a request: tokens with the stop token, if it stopped, and the log-prob of each."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.stopped else self.tokens


def request_key(seed: int, request_id: str) -> Array:
    """The typed key of a request: a function of the seed and the id alone."""
    key: Array = _request_keys(jax.random.key(seed), _words([request_id]))[0]
    return key


def generate(
    params: Params,
    config: LlamaConfig,
    requests: Sequence[Request],
    rules: SamplingRules,
    *,
    seed: int,
    prefix_tokens: Sequence[int],
    batch_size: int,
    prompt_multiple: int,
) -> Iterator[Completion]:
    """Continue every request, in order, a batch at a time.

    A request's tokens depend on the model, its prompt, the rules, the seed and its id; not on its neighbours. Under a
    mesh, iterate inside `jax.set_mesh`.

    Args:
        params: the model's tree.
        config: the model's shape.
        requests: what to continue.
        rules: how to draw and when to stop.
        seed: with the ids, the source of all randomness.
        prefix_tokens: what every request saw before its prompt, computed once; may be empty.
        batch_size: B, rows per program; a last batch with fewer requests is filled up.
        prompt_multiple: prompts are padded to a multiple of it; larger means fewer programs to compile.

    Raises:
        InputError: an empty prompt, a token outside the vocabulary, an id given twice, or a prompt that leaves no room
            for max_new_tokens within the model's positions.
    """
    _check(config, requests, rules, prefix_tokens)
    return _batches(params, config, requests, rules, seed, tuple(prefix_tokens), batch_size, prompt_multiple)


def _batches(
    params: Params,
    config: LlamaConfig,
    requests: Sequence[Request],
    rules: SamplingRules,
    seed: int,
    prefix_tokens: tuple[int, ...],
    batch_size: int,
    prompt_multiple: int,
) -> Iterator[Completion]:
    if not requests:
        return
    platform = next(iter(jax.tree.leaves(params)[0].devices())).platform
    params, config = decode_layout(params, config, platform)
    prefix: Prefix | None = None
    if prefix_tokens:
        prefix = _prefill_prefix(params, config, jnp.asarray(prefix_tokens, jnp.int32))
    root = jax.random.key(seed)
    for first in range(0, len(requests), batch_size):
        group = requests[first : first + batch_size]
        prompts, lengths = pad_batch([request.prompt for request in group], batch_size, prompt_multiple)
        ids = [request.id for request in group]
        keys = _request_keys(root, _words(ids + ids[:1] * (batch_size - len(ids))))
        drawn = jax.device_get(sample(params, config, prompts, lengths, keys, prefix, rules))
        for row, request in enumerate(group):
            count = int(drawn.lengths[row])
            yield Completion(
                id=request.id,
                tokens=tuple(drawn.tokens[row, :count].tolist()),
                logprobs=tuple(drawn.logprobs[row, :count].tolist()),
                stopped=bool(drawn.stopped[row]),
            )


def _check(
    config: LlamaConfig, requests: Sequence[Request], rules: SamplingRules, prefix_tokens: Sequence[int]
) -> None:
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise InputError(f"request id {request.id!r} is given twice: ids must differ, since samples depend on them")
        seen.add(request.id)
        if not request.prompt:
            raise InputError(f"request {request.id!r} has an empty prompt; give it at least one token")
        needed = len(prefix_tokens) + len(request.prompt) + rules.max_new_tokens
        if needed > config.max_position_embeddings:
            raise InputError(
                f"request {request.id!r}: prefix {len(prefix_tokens)} + prompt {len(request.prompt)} + max_new_tokens "
                f"{rules.max_new_tokens} = {needed} exceed the model's {config.max_position_embeddings} positions"
            )
        _check_tokens(f"request {request.id!r}", request.prompt, config.vocab_size)
    _check_tokens("prefix", prefix_tokens, config.vocab_size)


def _check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InputError(f"{name} holds token {token}, but the model's vocabulary is 0..{vocab_size - 1}")


def _words(ids: Sequence[str]) -> np.ndarray:
    """Two 32-bit words of each id's SHA-256: [B, 2] uint32."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in ids)
    return np.frombuffer(digests, "<u4").reshape(len(ids), 2)


@jax.jit
def _request_keys(root: Array, words: Array) -> Array:
    """Keys [B] of the ids that hashed to `words` [B, 2]."""
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1]))(words)
