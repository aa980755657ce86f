"""report.html and report.md: one self-contained page, and the same in markdown beside its figures.

The page loads nothing: figures are inline SVG, the style is inside, and a content security policy forbids the rest. All
text is escaped by the template engine after control characters were made visible.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from almost_jax.io.records import write_bytes
from almost_jax.io.run import Run
from almost_jax.report import plots, scored, tables
from almost_jax.report.blocks import Dialogue, FigureBlock, Listing, Section, TableBlock
from almost_jax.report.sections import abstract, load, load_json, sections
from almost_jax.report.text import fenced, markdown, visible

FIGURES = "figures"
# In the head of a page that has notes; escaped text can't look like it.
_NOTED = '<meta name="almost-jax" content="has notes">'
_TEMPLATES = Path(__file__).resolve().parent / "templates"


def run_stage(run: Run) -> dict[str, Any]:
    """Write report.html and report.md of a run."""
    build(run.directory)
    return {"page": "report.html"}


def has_notes(directory: Path) -> bool:
    """Whether report.html was built with notes: in between, from stages that were not all up to date."""
    page = directory / "report.html"
    return page.is_file() and _NOTED.encode() in page.read_bytes()


def build(directory: Path, notes: Sequence[str] = ()) -> Path:
    """Write report.html, report.md and figures/*.png from what a run's folder holds.

    Args:
        directory: the run's folder.
        notes: said at the top, such as what isn't up to date.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder is no run, or one of its files is damaged.
    """
    material = load(directory)
    title = f"almost_jax: {material.config.get('name', directory.name)}"
    with plots.style():
        found, summary = sections(material), " ".join([*notes, abstract(material)])
        page = _html(title, summary, found, bool(notes))
        for section in found:
            for block in section.blocks:
                if isinstance(block, FigureBlock):
                    write_bytes(directory / FIGURES / f"{block.name}.png", plots.as_png(block.figure))
    write_bytes(directory / "report.md", _markdown(title, summary, found).encode("utf-8", "replace"))
    write_bytes(directory / "report.html", page.encode("utf-8", "replace"))
    return directory / "report.html"


def summary_table(directory: Path) -> str:
    """The final table of a run, for a terminal: claims with figures, interval and verdict, or else every step's scores.

    Valid markdown too. Control characters are made visible; print it without markup. Without either it says so.
    """
    gold = load_json(directory / "evaluation" / "gold.json")
    scores = load_json(directory / "evaluation" / "scores.json")
    if gold is None and scores is not None:
        return tables.as_markdown(scored.steps_table(scores), escape=False)
    if gold is None:
        return f"{visible(str(directory))}: no evaluation/gold.json, so there is no gold score to judge the steps by"
    return tables.as_markdown(tables.claims_table(tables.claims(gold)), escape=False)


def environment() -> Environment:
    """The template engine: escapes everything, refuses unknown names, makes control characters visible."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _html(title: str, summary: str, found: Sequence[Section], noted: bool) -> str:
    def svg(block: FigureBlock) -> Markup:
        return Markup(plots.as_svg(block.figure, block.name))  # ours: matplotlib escapes the text it draws

    def kind(block: Any) -> str:
        return type(block).__name__

    return (
        environment()
        .get_template("page.html.j2")
        .render(title=title, summary=summary, sections=found, svg=svg, kind=kind, noted=Markup(_NOTED if noted else ""))
    )


def _markdown(title: str, summary: str, found: Sequence[Section]) -> str:
    lines = [f"# {markdown(title)}", markdown(summary)]
    for section in found:
        lines.append(f"## {markdown(section.title)}")
        lines += [_block(block) for block in section.blocks]
    return "\n\n".join(lines) + "\n"


def _block(block: Any) -> str:
    match block:
        case FigureBlock(name, _, caption):
            return f"![{markdown(caption)}]({FIGURES}/{name}.png)\n\n{markdown(caption)}"
        case TableBlock(table, caption):
            return f"{tables.as_markdown(table, escape=True)}\n\n{markdown(caption)}"
        case Dialogue(query, kind, replies):
            table = tables.Table(("policy", "response", "score"), list(replies), (2,))
            return f"**{markdown(query)}** ({markdown(kind)})\n\n{tables.as_markdown(table, escape=True)}"
        case Listing(title, text):
            return f"{markdown(title)}:\n\n{fenced(text)}"
        case _:
            return markdown(block)
