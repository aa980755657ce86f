"""Stop strings, wherever tokens begin and end: where a completion is over, to the token."""

import dataclasses
from collections.abc import Callable, Sequence

# What stands for bytes that are no letter, or not yet.
_BEGUN = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """What ends a completion when its text holds it.

    `decode` turns a completion's tokens into the text in which the strings are looked for. A string counts as soon as
    it stands in the text of the tokens so far, however they split it.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def __post_init__(self) -> None:
        if not all(self.strings):
            raise ValueError(f"stop strings {list(self.strings)} must not be empty: every text holds an empty one")

    def first(self, tokens: Sequence[int], checked: int) -> int | None:
        """The smallest number of tokens whose text holds a stop string; None when no text of theirs does.

        Args:
            tokens: a completion so far, without a stop token.
            checked: so many of them are known to hold none.
        """
        text = self.decode(tokens)
        # Beside a letter that is begun and never finished some tokenizers read other bytes as begun letters too.
        if not self._in(text) and _BEGUN not in text:
            return None
        found = (count for count in range(checked + 1, len(tokens) + 1) if self._in(self.decode(tokens[:count])))
        return next(found, None)

    def before(self, tokens: Sequence[int]) -> int:
        """How many tokens spell what stands before the first stop string, but for whitespace at its end.

        A token that holds the end of it and the beginning of the string counts. All of them where no string is found.
        """
        text = self.decode(tokens)
        found = [place for place in map(text.find, self.strings) if place >= 0]
        if not found:
            return len(tokens)
        head = text[: min(found)].rstrip()
        # By the letters and not by their number: one that is begun is read as another one.
        return next(count for count in range(len(tokens) + 1) if self.decode(tokens[:count]).startswith(head))

    def _in(self, text: str) -> bool:
        return any(string in text for string in self.strings)


def without_space(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int:
    """How many tokens spell their text but for whitespace at its end."""
    text = decode(tokens)
    head, count = text.rstrip(), len(tokens)
    if head == text:
        return count
    while count and decode(tokens[: count - 1]).startswith(head):
        count -= 1
    return count
