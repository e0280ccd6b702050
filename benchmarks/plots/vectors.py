"""Plots alignment vectors: reward by coefficient, two vectors at once, and methods of steering at the same KL."""

from __future__ import annotations

from statistics import mean
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#08306b", "#d95f0e")
SHADES = ("#d95f0e", "#9ecae1", "#4292c6", "#08306b")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Plot the rows of `results/vectors.json`: one vector, two vectors at once, and reward by KL."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    names = list(dict.fromkeys(row["vector"] for row in rows if row["what"] == "exactness"))
    _levels(panels[0], [row for row in rows if row["what"] == "level"], names)
    _both(panels[1], [row for row in rows if row["what"] == "two"], names)
    _ways(panels[2], [row for row in rows if row["what"] == "sweep"])
    return figure


def _levels(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    levels = sorted({level for row in rows for level in row["coefficients"].values()})
    for colour, name in zip(COLOURS, names, strict=True):
        for scored, style in ((name, "-"), (next(n for n in names if n != name), ":")):
            found = [[row["rewards"][scored] for row in rows if row["coefficients"] == {name: x}] for x in levels]
            line = [mean(values) for values in found]
            spread = [[m - min(v) for m, v in zip(line, found, strict=True)],
                      [max(v) - m for m, v in zip(line, found, strict=True)]]  # fmt: skip
            label = f"vector {name}, scored {scored}"
            axes.errorbar(levels, line, yerr=spread, color=colour, linestyle=style, marker="o", markersize=3,
                          capsize=2, linewidth=1.3, label=label)  # fmt: skip
    axes.set_title("one vector", fontsize=9, loc="left")
    axes.set_xlabel("coefficient", fontsize=8.5)
    axes.set_ylabel("reward (standard deviations)", fontsize=8.5)
    axes.legend(frameon=False, fontsize=6.5, loc="lower right")


def _both(axes: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    first, second = names
    levels = sorted({row["coefficients"][first] for row in rows})
    for shade, kept in zip(("#9ecae1", "#4292c6", "#08306b"), levels, strict=True):
        points = [
            [
                mean(r["rewards"][scored] for r in rows if r["coefficients"] == {first: kept, second: level})
                for scored in names
            ]
            for level in levels
        ]
        axes.plot(*zip(*points, strict=True), color=shade, marker="o", markersize=4, label=f"{first} at {kept:g}")
        for (x, y), level in zip(points, levels, strict=True):
            axes.annotate(f"{level:g}", (x, y), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_title(f"two at once ({second} at the number)", fontsize=9, loc="left")
    axes.set_xlabel(f"reward {first}", fontsize=8.5)
    axes.set_ylabel(f"reward {second}", fontsize=8.5)
    axes.legend(frameon=False, fontsize=7, loc=(0.1, 0.35))


def _ways(axes: Any, rows: list[dict[str, Any]]) -> None:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for way, colour in zip(ways, SHADES, strict=True):
        groups: dict[float, list[dict[str, Any]]] = {} if "merged" in way else {0.0: [{"kl": 0.0, "reward": 0.0}]}
        for row in rows:
            if row["way"] == way:
                groups.setdefault(row["strength"], []).append(row)
        points = sorted((mean(r["kl"] for r in g), mean(r["reward"] for r in g)) for g in groups.values())
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.4, label=way)
    axes.set_xlim(0, 7.5)
    axes.set_ylim(bottom=0)
    axes.set_title("both objectives at equal weights", fontsize=9, loc="left")
    axes.set_xlabel("KL to the embedded policy (nats per response)", fontsize=8.5)
    axes.set_ylabel("reward", fontsize=8.5)
    axes.legend(frameon=False, fontsize=7, loc="lower right")
