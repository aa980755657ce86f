"""A model's words on a terminal: as they come, and unable to drive it."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from almost_jax.io.tokenizer import Tokenizer

# Shown as what they are. The other control characters get their picture, ␛ for escape.
_KEPT = {"\n", "\t"}
_PICTURES, _DELETE = 0x2400, 0x7F
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# Joiners inside emoji and Persian words; all other format characters hide text, or turn its direction round.
_JOINERS = {"\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH NON-JOINER}"}
_BREAKS = {"\N{LINE SEPARATOR}", "\N{PARAGRAPH SEPARATOR}"}


def harmless(text: str) -> str:
    """The text with nothing in it that a terminal obeys: escape sequences show as letters.

    Control characters (C0, delete and C1, but newline and tab) become visible; format characters, such as those that
    turn the writing direction round, go; line separators become newlines.
    """
    return "".join(_harmless(letter) for letter in text)


def _harmless(letter: str) -> str:
    if letter in _KEPT or letter in _JOINERS:
        return letter
    if letter in _BREAKS:
        return "\n"
    category = unicodedata.category(letter)
    if category == "Cc":
        code = ord(letter)
        if code < 0x20:
            return chr(_PICTURES + code)
        return chr(_PICTURES + 0x21) if code == _DELETE else _UNKNOWN
    if category in ("Cs", "Co", "Cn"):
        return _UNKNOWN
    return "" if category == "Cf" else letter


def spoken(tokenizer: Tokenizer, ids: Iterable[int], stops: Sequence[str]) -> Iterator[str]:
    """The text of tokens in pieces, as they come; ends where one of the stops begins.

    Whitespace before the first word is left out, and before a stop. The text's beginning counts as that of a line, for
    stops that begin with a line break. What may become a letter (bytes of UTF-8) or a stop is held back until it is
    known which.

    Args:
        tokenizer: of the tokens.
        ids: one after the other; special tokens give no text.
        stops: texts that end it and are not given.
    """
    seen: list[int] = []
    given = 1
    for token in ids:
        seen.append(token)
        text = _lined(tokenizer, seen)
        found = _first(text, stops)
        if found is not None:
            yield from _piece(text[given:found].rstrip())
            return
        certain = _certain(text, stops)
        if certain > given:
            yield text[given:certain]
            given = certain
    yield from _piece(_lined(tokenizer, seen)[given:])


def _lined(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return "\n" + tokenizer.decode_exactly(ids).lstrip()


def _piece(text: str) -> Iterator[str]:
    if text:
        yield text


def _first(text: str, stops: Sequence[str]) -> int | None:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places) if places else None


def _certain(text: str, stops: Sequence[str]) -> int:
    """How much of the text more tokens can't change."""
    # Bytes of a letter that isn't whole yet decode to this sign.
    end = len(text.rstrip(_UNKNOWN))
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return len(text[:end].rstrip()) if stops else end
