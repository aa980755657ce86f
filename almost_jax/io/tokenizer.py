"""Text to token ids and back, through transformers' fast tokenizers."""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from almost_jax.errors import InputError

# Any of these makes a folder one that AutoTokenizer can read.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What describes a model of ours, beside its tokenizer.
CARD = "model.json"
# What SentencePiece writes for a space, and a text behind which others begin without one.
_SPACE, _ANCHOR = "\u2581", "\n"


class Tokenizer:
    """A tokenizer without surprises: no special tokens are added, and none are read out of plain text.

    Attributes:
        vocab_size: V, added tokens included; a model may have more rows, never fewer.
        eos_id: the end of a document or response.
        pad_id: falls back to `eos_id`: masks come from lengths, so this is harmless.
        bos_id: the beginning of a document; None if the tokenizer has none.
        unk_id: what stands for letters that the tokenizer doesn't know; None if it knows all.
        fingerprint: equal for tokenizers that encode alike, wherever they were loaded from.
    """

    def __init__(self, backend: Any) -> None:
        """Wrap a transformers tokenizer.

        Raises:
            InputError: it has no end-of-text token.
        """
        if backend.eos_token_id is None:
            raise InputError("tokenizer has no eos_token; set one in tokenizer_config.json: responses must end")
        self._backend = backend
        self.vocab_size: int = len(backend)
        self.eos_id: int = backend.eos_token_id
        self.bos_id: int | None = backend.bos_token_id
        self.unk_id: int | None = backend.unk_token_id
        self.pad_id: int = self.eos_id if backend.pad_token_id is None else backend.pad_token_id
        self.fingerprint: str = _fingerprint(backend)
        self._begins_with_space = _begins_with_space(backend)

    @property
    def begin(self) -> list[int]:
        """What a document begins with: its one id, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; a special token's name in it ("</s>") is encoded as the letters it is made of."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that a user wrote, as transformers gives them.

        Special tokens that the tokenizer puts around a text are added, and those named in it are read as such.
        """
        ids: list[int] = self._backend.encode(text)
        return ids

    def encode_behind(self, text: str, plain: bool = False) -> list[int]:
        """The ids of a text that stands right behind another one: nothing is added to it.

        A tokenizer of LLaMA 1 and 2 begins every text with a space of its own, which a text that goes on has not.

        Args:
            text: what a user wrote: special tokens named in it are read as such.
            plain: they are encoded as the letters that they are made of, as by `encode`.
        """

        def ids(said: str) -> list[int]:
            found: list[int] = self._backend.encode(said, add_special_tokens=False, split_special_tokens=plain)
            return found

        if not self._begins_with_space:
            return ids(text)
        anchor, whole = ids(_ANCHOR), ids(_ANCHOR + text)
        if whole[: len(anchor)] == anchor:
            return whole[len(anchor) :]
        return ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, whitespace at both ends stripped."""
        return self.decode_exactly(ids).strip()

    def decode_exactly(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, with the whitespace at its ends."""
        plain = [int(token) for token in ids]
        text: str = self._backend.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def decode_behind(self, ids: Sequence[int]) -> str:
        """The text of ids that stand right behind other ones, as `decode_exactly` but with a space that it begins with.

        As the beginning of a text, a tokenizer of LLaMA 1 and 2 takes that space for its own and drops it.
        """
        if not self._begins_with_space:
            return self.decode_exactly(ids)
        anchor = self._backend.encode(_ANCHOR, add_special_tokens=False)
        return self.decode_exactly([*anchor, *ids])[len(self.decode_exactly(anchor)) :]

    def single_token(self, text: str) -> int | None:
        """The id of a text that is exactly one known token, else None."""
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and ids[0] != self._backend.unk_token_id else None

    @property
    def backend(self) -> Any:
        """The transformers tokenizer itself, for libraries that ask for one."""
        return self._backend

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a dialogue is written."""
        return bool(self._backend.chat_template)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a dialogue by the tokenizer's own template, up to where the assistant's next turn begins.

        Args:
            messages: {"role": "system", "user" or "assistant", "content": text}, one after the other.

        Raises:
            InputError: there is no template, or it refuses the dialogue (one that knows no system turn, say).
        """
        if not self.has_chat_template:
            raise InputError("the tokenizer has no chat template")
        try:
            ids: list[int] = self._backend.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        # A template is a program of its author's.
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(f"the tokenizer's chat template fails ({type(error).__name__}: {line})") from error
        return [int(token) for token in ids]

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer; it has this chat template unless it had one before."""
        backend = copy.deepcopy(self._backend)
        backend.chat_template = backend.chat_template or template
        return Tokenizer(backend)

    def with_pad(self, pad_id: int) -> "Tokenizer":
        """The same tokenizer with another of its tokens for padding."""
        backend = copy.deepcopy(self._backend)
        backend.pad_token = backend.convert_ids_to_tokens(pad_id)
        return Tokenizer(backend)

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files into a folder, beside what is there."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._backend.save_pretrained(str(directory))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer from a folder; nothing is downloaded and no code of the folder's is run.

    Raises:
        InputError: the folder or its tokenizer files are missing or can't be read, or there is no end-of-text token.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in FILES):
        raise InputError(f"{path}: no tokenizer found; expected a folder with one of {', '.join(FILES)}")
    content = _content(path)
    if content not in _read:
        while len(_read) >= _READ_KEPT:
            del _read[next(iter(_read))]
        _read[content] = _parse(path)
    return _read[content]


# Tokenizers by the content of their files: a run loads many models, all with one of a few.
_read: dict[str, Tokenizer] = {}
_READ_KEPT = 8


def _content(folder: Path) -> str:
    """A digest of all files of a folder that a tokenizer may be read from, which weights and model.json are not."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != CARD and path.suffix in (".json", ".txt", ".model", ".jinja"):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _parse(path: Path) -> Tokenizer:
    # Said on import, and of no interest here: only tokenizers are used, PyTorch isn't missed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # Its warnings are about the model's config, which is none of its business here.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        backend = AutoTokenizer.from_pretrained(
            str(path), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    # The library lets through whatever its parsers raise, plain Exception included.
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: the tokenizer can't be read ({type(error).__name__}: {line})") from error
    finally:
        logging.set_verbosity(verbosity)
    if backend.eos_token_id is None:
        _take_end(backend, path)
    try:
        return Tokenizer(backend)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _take_end(backend: Any, folder: Path) -> None:
    """Take the end of text from the model's files where the tokenizer's own name none."""
    for name in ("generation_config.json", "config.json"):
        try:
            ends = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        first = ends[0] if isinstance(ends, list) and ends else ends
        if isinstance(first, int) and 0 <= first < len(backend):
            backend.eos_token = backend.convert_ids_to_tokens(first)
            return


def _begins_with_space(backend: Any) -> bool:
    """Whether a text without one is encoded as if it began with a space."""
    ids = backend.encode("a", add_special_tokens=False)
    first = backend.convert_ids_to_tokens(ids[0]) if ids else ""
    return isinstance(first, str) and first.startswith(_SPACE)


def _fingerprint(backend: Any) -> str:
    fast = getattr(backend, "backend_tokenizer", None)
    body = backend.get_vocab() if fast is None else json.loads(fast.to_str())
    # Set by calls that pad or truncate, so a matter of history and not of the tokenizer.
    for key in ("padding", "truncation"):
        body.pop(key, None)
    special = [backend.pad_token_id, backend.bos_token_id, backend.eos_token_id, backend.unk_token_id]
    return hashlib.sha256(json.dumps([body, special], sort_keys=True).encode()).hexdigest()
