"""Tokenizers from GGUF metadata: byte-level BPE (LLaMA 3, SmolLM) and SentencePiece's BPE (LLaMA 1, 2, TinyLlama)."""

import os
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from almost_jax.errors import InputError
from almost_jax.io.tokenizer import Tokenizer

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre: how text is cut into words before they are merged. llama.cpp knows more; these are LLaMA's.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_GPT2 = ("gpt-2",)
_SINGLE_DIGITS = ("smollm",)

Get = Callable[[str], Any]


def build_tokenizer(get: Get, where: str) -> Tokenizer:
    """Rebuild a tokenizer.

    Args:
        get: a metadata field by its name; None when there is none.
        where: the file, for messages.

    Raises:
        InputError: it is of a kind that can't be rebuilt faithfully, or a field is missing or doesn't fit the others.
    """
    tokens, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    if not tokens:
        raise InputError(f"{where}: tokenizer.ggml.tokens is missing; the file holds no tokenizer")
    kinds = [_NORMAL] * len(tokens) if kinds is None else kinds
    if len(kinds) != len(tokens):
        raise InputError(f"{where}: {len(kinds)} of tokenizer.ggml.token_type for {len(tokens)} tokens")
    ids = {token: place for place, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.tokens holds a token twice")
    kind = get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, begins = _byte_level(get, where, ids)
    elif kind == "llama":
        backend, begins = _sentencepiece(get, where, tokens, kinds, ids)
    else:
        raise InputError(f"{where}: tokenizer.ggml.model {kind!r} isn't supported; expected 'gpt2' or 'llama'")
    marked = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(token, special=marked[kind], normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in marked
        ]
    )
    special = {
        name: _special(get, where, tokens, key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    begins = begins if get("tokenizer.ggml.add_bos_token") is None else bool(get("tokenizer.ggml.add_bos_token"))
    _add_ends(backend, ids, special["bos"] if begins else None, special["eos"] if _ends(get) else None)
    return _wrap(get, where, backend, {f"{name}_token": token for name, token in special.items() if token is not None})


def _wrap(get: Get, where: str, backend: Backend, special: dict[str, str]) -> Tokenizer:
    # Said on import, and of no interest here: only tokenizers are used, PyTorch isn't missed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=get("llama.context_length"),
        chat_template=get("tokenizer.chat_template"),
        **special,
    )
    try:
        return Tokenizer(wrapped)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _byte_level(get: Get, where: str, ids: dict[str, int]) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether a text begins with the beginning of text unless the file says otherwise."""
    pre, merges = get("tokenizer.ggml.pre"), get("tokenizer.ggml.merges")
    if merges is None:
        raise InputError(f"{where}: tokenizer.ggml.merges is missing; byte-level BPE needs them")
    known = (*_LLAMA3, *_GPT2, *_SINGLE_DIGITS)
    if pre not in known:
        raise InputError(f"{where}: tokenizer.ggml.pre {pre!r} can't be run faithfully; known: {', '.join(known)}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = BPE(vocab=ids, merges=pairs, fuse_unk=False, ignore_merges=pre in _LLAMA3)
    # The library raises Exception itself.
    except Exception as error:
        raise InputError(f"{where}: tokenizer.ggml.merges don't fit the tokens ({error})") from error
    backend = Backend(model)
    if pre in _LLAMA3:
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated", invert=False)
        steps = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in _SINGLE_DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _LLAMA3


def _sentencepiece(
    get: Get, where: str, tokens: list[str], kinds: list[int], ids: dict[str, int]
) -> tuple[Backend, bool]:
    """SentencePiece's BPE: it merges the pair whose piece has the best score, so scores become an order of merges."""
    scores = get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        found = "missing" if scores is None else f"{len(scores)} for {len(tokens)} tokens"
        raise InputError(f"{where}: tokenizer.ggml.scores: {found}; SentencePiece's BPE needs one per token")
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    ranked = sorted((token for token in plain if len(token) > 1), key=lambda token: (-scores[ids[token]], ids[token]))
    merges = [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    unknown = _special(get, where, tokens, "unknown") or "<unk>"
    model = BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in kinds)
    backend = Backend(model)
    prefix = get("tokenizer.ggml.add_space_prefix")
    spaces = normalizers.Replace(" ", "▁")
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is None or prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.decoder = decoders.Sequence([*strip, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = spaces
        backend.decoder = decoders.Sequence(strip)
    return backend, True


def _special(get: Get, where: str, tokens: list[str], key: str) -> str | None:
    place = get(f"tokenizer.ggml.{key}_token_id")
    if place is None:
        return None
    if not 0 <= place < len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.{key}_token_id is {place}; there are {len(tokens)} tokens")
    return tokens[place]


def _ends(get: Get) -> bool:
    return bool(get("tokenizer.ggml.add_eos_token"))


def _add_ends(backend: Backend, ids: dict[str, int], bos: str | None, eos: str | None) -> None:
    """Let the tokenizer put beginning and end of text around a text, where they are given."""
    ends = [token for token in (bos, eos) if token is not None]
    if not ends:
        return
    one = [token for token in (bos, "$A", eos) if token is not None]
    two = [*one, *(f"{token}:1" for token in (bos, "$B", eos) if token is not None)]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(one), pair=" ".join(two), special_tokens=[(token, ids[token]) for token in dict.fromkeys(ends)]
    )
