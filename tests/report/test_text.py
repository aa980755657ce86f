"""Hostile text is shown, and does nothing."""

import re

import pytest
from markdown_it import MarkdownIt

from almost_jax.report.text import fenced, markdown, one_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcödé 文字 👩‍🔬", "plain, ünïcödé 文字 👩‍🔬"),
        ("two\nlines\tand tab", "two\nlines\tand tab"),
        ("dos\r\nline", "dos\nline"),
        ("over\rwritten", "over␍written"),
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("\x00\x08\x7f\x9b2J\x85", "␀␈␡\\x9b2J\\x85"),
        ("\u202egnp.exe\u2066\ufeff\u200b", "<U+202E>gnp.exe<U+2066><U+FEFF><U+200B>"),
        ("line\u2028separator", "line<U+2028>separator"),
        ("half a surrogate \ud800", "half a surrogate \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_one_line() -> None:
    assert one_line("  a\n\n b\tc \x1b ") == "a b c ␛"


HOSTILE = [
    "<script>alert(1)</script>",
    "a <b>bold</b> & &lt;",
    "**bold** _it_ `code` ~~gone~~",
    "![x](http://evil.example/x.png)",
    "[l](javascript:alert(1))",
    "<http://evil.example>",
    "http://evil.example www.evil.example me@evil.example",
    "| a | b |",
    "# heading",
    "- item",
    "1. item",
    "1) item",
    "> quote",
    "===",
    "---",
    "```\ncode\n```",
    "    indented code",
    "\\*",
    "[x]: http://evil.example",
    "line\n# second",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_renders_as_the_text_itself(text: str) -> None:
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(markdown(text))
    tags = set(re.findall(r"</?([a-z0-9]+)", rendered))
    assert tags <= {"p", "br"}, rendered
    plain = re.sub(r"<[^>]+>", "\n", rendered)
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        plain = plain.replace(entity, sign)
    assert plain.split() == text.split()


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_keeps_a_table_cell_one_cell(text: str) -> None:
    table = f"| a | b |\n| - | - |\n| {markdown(text)} | end |\n"
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(table)
    assert rendered.count("<td>") == 2
    assert "<td>end</td>" in rendered


def test_a_fence_outlasts_the_fences_inside() -> None:
    text = "```\n`````\n~~~ <b>"
    rendered = MarkdownIt().render(fenced(text))
    assert rendered == "<pre><code>```\n`````\n~~~ &lt;b&gt;\n</code></pre>\n"
