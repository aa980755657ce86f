"""The figures of the report, drawn once: as inline SVG that takes the page's colours, and as PNG for report.md.

Colours are Okabe and Ito's, told apart by colour-blind readers too, and never carry a meaning alone: everything is also
labelled or placed. In the SVG each becomes a CSS variable, so that the page's dark theme reaches into the figures.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from almost_jax.report.tables import FILTER_NAMES, POLICY_NAMES, Gold
from almost_jax.report.text import one_line

INK, MUTED, RULE = "#1f2328", "#5f6670", "#d4d8dd"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", BLUE: "--blue", ORANGE: "--orange", GREEN: "--green"}

WIDTH = 6.8  # inches; the page's text column
DPI = 160
# Distances of PPO that are drawn on a scale which is logarithmic from 1 nat on.
FAR = 10.0
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "almost_jax",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
}

Interval = tuple[str, float, Sequence[float] | None]  # label, mean, [low, high]


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, for as long as figures are made and rendered.

    Signs that matplotlib's own font lacks are no fault of the run: the page's fonts show them, a PNG shows a box.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield


def configurations(gold: Gold, labels: Mapping[str, str]) -> Figure:
    """Mean gold score of each configuration, best expected first; `labels` say what each of them is."""
    rows = [(labels.get(name, name), figure["mean"], figure["ci95"]) for name, figure in gold["configurations"].items()]
    return interval_dots(rows, "mean gold score on held-out queries")


def policies(gold: Gold) -> Figure:
    """Mean gold score of each policy, in the order of the method."""
    rows = [(POLICY_NAMES.get(name, name), figure["mean"], figure["ci95"]) for name, figure in gold["policies"].items()]
    return interval_dots(rows, "mean gold score on held-out queries")


def interval_dots(rows: Sequence[Interval], measure: str) -> Figure:
    """One labelled dot with its interval a row, from the top down."""
    figure = Figure(figsize=(WIDTH, 0.55 + 0.36 * len(rows)))
    _dots(figure.subplots(), rows, measure)
    return figure


def filters(gold: Gold) -> Figure:
    """Pairs kept, and how many of them are right, after each filter."""
    figure = Figure(figsize=(WIDTH, 0.75 + 0.36 * len(FILTER_NAMES)))
    left, right = figure.subplots(1, 2, sharey=True)
    labels = list(FILTER_NAMES.values())
    kept = [gold["pairs"][name]["kept"] for name in FILTER_NAMES]
    left.barh(range(len(labels)), kept, height=0.55, color=BLUE)
    for row, count in enumerate(kept):
        left.annotate(f"{count:,}", (count, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    left.set_xlim(0, max([*kept, 1]) * 1.2)
    left.set_title("pairs kept")
    left.grid(visible=False)
    left.set_xticks([])
    left.spines["bottom"].set_visible(False)
    details = [gold["pair_details"][name]["accuracy"] for name in FILTER_NAMES]
    rows = [
        (label, detail["mean"], detail["ci95"]) if detail else (label, float("nan"), None)
        for label, detail in zip(labels, details, strict=True)
    ]
    _dots(right, rows, "")
    right.set_title("share whose chosen response is better")
    return figure


def score_by_length(by_length: Mapping[str, Any]) -> Figure | None:
    """Gold score, reward and as-is reward against length, one panel each; None without two bins."""
    bins = by_length["bins"]
    if len(bins) < 2:
        return None
    panels = [
        (field, title, color)
        for field, title, color in (
            ("gold", "gold score", INK),
            ("reward", "reward model", BLUE),
            ("as_is", "as-is reward model", ORANGE),
        )
        if field in bins[0]
    ]
    figure = Figure(figsize=(WIDTH, 2.1))
    lengths = [group["characters"] for group in bins]
    for axes, (field, title, color) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.plot(lengths, [group[field] for group in bins], color=color, marker="o", markersize=4)
        r = by_length["correlation"][field]
        axes.set_title(title if r is None else f"{title}, r = {r:+.2f}")
        axes.set_xlabel("characters")
    return figure


def over_optimisation(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """The scores of PPO's policies that were taken, against their distance from SFT; None without two points.

    Args:
        curves: points of each run of PPO by what it is called; the first is drawn full, others hollow and dashed.
    """
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 2.9))
    farthest = max(point["kl"] for curve in curves.values() for point in curve)
    known = (
        ("reward", "reward model's score", BLUE),
        ("as_is", "as-is reward model's score", ORANGE),
        ("gold", "gold score", GREEN),
    )
    panels = [panel for panel in known if all(panel[0] in curve[0] for curve in curves.values())]
    for axes, (field, title, color) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            _along_ppo(axes, curve, field, {
                "color": color, "linestyle": "--" if number else "-", "markerfacecolor": "none" if number else color,
                "label": name,
            }, not number)
        axes.set_title(title)
        if farthest > FAR:
            # Near and far policies are both to be seen.
            axes.set_xscale("symlog", linthresh=1.0)
            ticks = [tick for tick in (0, 1, 10, 100) if tick < 3 * farthest]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.margins(x=0.15, y=0.2)
    figure.supxlabel("KL from the SFT policy (nats a response)", fontsize=8, color=MUTED)
    if len(curves) > 1:
        lines = [
            Line2D([], [], color=INK, marker="o", markersize=4, linestyle="--" if number else "-",
                   markerfacecolor="none" if number else INK, label=name)
            for number, name in enumerate(curves)
        ]  # fmt: skip
        figure.legend(handles=lines, fontsize=7.5, loc="outside upper center", ncols=len(lines), frameon=False)
    return figure


def _along_ppo(
    axes: Any, curve: Sequence[Mapping[str, Any]], field: str, style: Mapping[str, Any], first: bool
) -> None:
    """One run of PPO: a score with its interval at every kept step; the `first` run says where all of them begin."""
    below = [max(point[field] - point[f"{field}_ci95"][0], 0.0) for point in curve]
    above = [max(point[f"{field}_ci95"][1] - point[field], 0.0) for point in curve]
    kl, values = [point["kl"] for point in curve], [point[field] for point in curve]
    axes.errorbar(kl, values, yerr=[below, above], marker="o", markersize=4, elinewidth=0.8, **style)
    for point in (curve[0], curve[-1]) if first else (curve[-1],):
        axes.annotate(
            f"step {point['step']}",
            (point["kl"], point[field]),
            (5, -11) if point is curve[0] else (6, -3) if first else (4, 7),
            textcoords="offset points",
            ha="left" if first else "right",
            fontsize=7.5,
            color=MUTED,
        )


def training_curves(metrics: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> Figure | None:
    """Small multiples of a stage's metrics over its steps; None when there is nothing to draw."""
    panels = []
    for field in fields:
        points = [(row["step"], row[field]) for row in metrics if row.get(field) is not None]
        if len(points) > 1:
            panels.append((field, points))
    if not panels:
        return None
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 1.55 * rows + 0.2))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (field, points) in zip(grid.flat, panels, strict=False):
        marker = "o" if len(points) < 12 else None
        axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.2, marker=marker, markersize=3)
        axes.set_title(one_line(field).replace("_", " ").replace("/", ", "))
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


def as_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element with the page's colours and fonts.

    Args:
        figure: made inside `style()`.
        name: a word that keeps this figure's ids apart from those of others on the page.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    # The page scales the figure to its column; the drawing's own size in points would win over that.
    for side in ("width", "height"):
        svg = re.sub(rf'(<svg\b[^>]*?) {side}="[^"]*pt"', r"\1", svg, count=1)
    return svg


def as_png(figure: Figure) -> bytes:
    """The figure in its light colours on white."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _dots(axes: Axes, rows: Sequence[Interval], measure: str) -> None:
    for row, (_, mean, ci95) in enumerate(rows):
        if ci95 is not None:
            axes.plot(ci95, [row, row], color=BLUE, linewidth=2, solid_capstyle="round")
        axes.plot([mean], [row], color=BLUE, marker="o", markersize=6)
        if mean == mean:
            axes.annotate(f"{mean:.2f}", (mean, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [one_line(label) for label, _, _ in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel(measure)
