"""The benchmarks' pictures: bars by engine, and the floor as a line over them."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

COLORS = {"ours": "#1f6f8b", "ours without refill": "#8fbccb", "transformers": "#c98a3b", "torch": "#c98a3b"}
COLORS |= {"transformers, one call": "#e3c08f", "tunix": "#8a8a8a"}


def plot_sampling(results: dict[str, Any], path: Path) -> Path:
    """Tokens a second of every engine and the floor, a panel a workload, a group of bars a core count."""
    names = list(results["workloads"])
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        groups = {cores: found["compared"][name] for cores, found in results["by_cores"].items()}
        _bars(panel, {cores: own["tokens_per_second"] for cores, own in groups.items()})
        for place, own in enumerate(groups.values()):
            floor = own["floor_tokens_per_second"]
            panel.hlines(floor, place - 0.45, place + 0.45, colors="black", linestyles="dashed", linewidth=1)
            panel.annotate("floor", (place + 0.45, floor), ha="right", va="bottom", fontsize=7)
        panel.set_title(name, fontsize=10)
        panel.set_ylabel("tokens a second")
        panel.set_ylim(top=1.4 * max(own["floor_tokens_per_second"] for own in groups.values()))
    return _save(figure, results, path)


def plot_training(results: dict[str, Any], path: Path) -> Path:
    """Seconds of a step of every engine, a panel a task, a group of bars a core count."""
    names = list(next(iter(results["by_cores"].values())))
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        _bars(panel, {cores: found[name]["seconds"] for cores, found in results["by_cores"].items()})
        panel.set_title(name, fontsize=10)
        panel.set_ylabel("seconds")
        panel.set_ylim(top=1.4 * panel.get_ylim()[1])
    return _save(figure, results, path)


def _bars(panel: Any, groups: dict[str, dict[str, float]]) -> None:
    for place, values in enumerate(groups.values()):
        width = 0.8 / max(len(values), 1)
        for number, (name, value) in enumerate(values.items()):
            left = place - 0.4 + number * width
            label = name if place == 0 else None
            bar = panel.bar(left, value, width, align="edge", color=COLORS.get(name, "#bbbbbb"), label=label)
            panel.bar_label(bar, fmt="%.3g", fontsize=7)
    panel.set_xticks(range(len(groups)), [f"{cores} core{'s' * (cores != '1')}" for cores in groups])
    panel.legend(fontsize=7, frameon=False, loc="upper left")
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, results: dict[str, Any], path: Path) -> Path:
    title = ", ".join(str(results[name]) for name in ("benchmark", "model", "dtype", "processor"))
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
