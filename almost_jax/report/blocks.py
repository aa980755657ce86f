"""What sections of the report are made of: paragraphs, figures, tables, dialogues, listings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from matplotlib.figure import Figure

from almost_jax.report.tables import Table

INTERVALS = "Lines are 95% bootstrap intervals over queries."


@dataclass(frozen=True)
class FigureBlock:
    """A figure with its caption; `name` is also its file's."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class TableBlock:
    """A table with its caption."""

    table: Table
    caption: str


@dataclass(frozen=True)
class Dialogue:
    """One query, and what several systems answered: (system, response, remark)."""

    query: str
    kind: str
    replies: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Listing:
    """Text as it is, folded away under a title."""

    title: str
    text: str


Block: TypeAlias = str | FigureBlock | TableBlock | Dialogue | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]
