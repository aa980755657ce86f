"""Untrusted text made fit to show: what a model wrote, or a config says, may hold anything.

HTML is escaped by the page's template engine; here control characters are made visible everywhere, and markdown is
escaped.
"""

import html
import re
import unicodedata

# Formatting characters that reorder or hide their neighbours; joiners and direction marks of scripts stay.
_HIDING = {
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0x00AD,
    0x061C,
    0x180E,
    0x200B,
    0x2060,
    0x2061,
    0x2062,
    0x2063,
    0x2064,
    0xFEFF,
}
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#!$(){}])")
# A list begins by a sign or number before a blank, a heading or rule by a line of signs; -0.5 and .657 are neither.
_LIST_START = re.compile(r"^(\s*)([-+](?=\s|$)|[-=](?=[-=\s]*$)|\d+(?=[.)](?:\s|$)))", re.MULTILINE)


def visible(text: str) -> str:
    """The text with every character that would act on a terminal or reorder a line replaced by a visible sign.

    Line breaks and tabs stay; escape becomes ␛, other controls a picture or their code, hidden formatting <U+NNNN>.
    """
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`visible`, with line breaks and runs of blanks as single blanks."""
    return " ".join(visible(text).split())


def markdown(text: str) -> str:
    """Text that markdown shows as it is, inside a table cell too: no tags, no emphasis, no links, no headings."""
    text = _MARKDOWN.sub(r"\\\1", html.escape(visible(text), quote=False))
    text = _LIST_START.sub(lambda match: f"{match[1]}&#{ord(match[2][0])};{match[2][1:]}", text)
    for sign, entity in (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;")):
        text = text.replace(sign, entity)
    return text.strip().replace("\n", "<br>")


def fenced(text: str) -> str:
    """A markdown code block that its content can't end."""
    text = visible(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _shown(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character in "\n\t":
        return character
    if category == "Cc":
        if code < 0x20:
            return chr(0x2400 + code)
        return "␡" if code == 0x7F else f"\\x{code:02x}"
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    if code in _HIDING or category in ("Zl", "Zp"):
        return f"<U+{code:04X}>"
    return character
