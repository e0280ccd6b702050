"""Labels at the ends of lines on a plot, placed where they overlap nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

INK = "#333333"


def label_ends(
    figure: Figure,
    axes: Axes,
    lines: Sequence[Array],
    texts: Sequence[str],
    centre: ArrayLike,
    others: Sequence[Array],
) -> None:
    """Place each text next to the last point of its line, outwards from `centre`, clear of all lines.

    A text that fits nowhere is left out; the colour still shows its weights.
    """
    figure.draw_without_rendering()  # computes the layout, so that positions in pixels are known
    in_pixels = [axes.transData.transform(line) for line in [*lines, *others]]
    steps = np.linspace(0.0, 1.0, 100)[:, None, None]
    drawn = [(line[:-1] + steps * np.diff(line, axis=0)).reshape(-1, 2) for line in in_pixels]
    angles = np.linspace(-np.pi, np.pi, 33)
    circle = 11 * np.column_stack([np.cos(angles), np.sin(angles)])  # around the rings of the front
    rings = [(line[:, None] + circle).reshape(-1, 2) for line in in_pixels[: len(lines)]]
    covered = np.concatenate(drawn + rings)
    legend, inside = axes.get_legend(), np.array(axes.bbox.extents)
    boxes = [] if legend is None else [np.array(legend.get_window_extent().extents)]
    middle = axes.transData.transform(np.asarray(centre))
    # Near and outwards first; half a turn costs as much as 40 pixels of distance.
    offsets = sorted(
        ((distance, angle) for distance in (13, 20, 30, 42, 56, 72) for angle in angles),
        key=lambda offset: offset[0] + 40 * abs(offset[1]) / np.pi,
    )
    for line, text in zip(in_pixels, texts, strict=False):
        end = line[-1]
        label = axes.text(0.5, 0.5, text, transform=axes.transAxes, fontsize=8.5, color=INK, zorder=7)
        label.set(ha="center", va="center")
        size = np.array(label.get_window_extent().size)
        outwards = np.arctan2(*(end - middle)[::-1])
        for distance, angle in offsets:
            direction = np.array([np.cos(outwards + angle), np.sin(outwards + angle)])
            position = end + direction * (distance + size / 2)
            box = np.concatenate([position - size / 2 - 4, position + size / 2 + 4])
            if (
                (box[:2] >= inside[:2]).all()
                and (box[2:] <= inside[2:]).all()
                and not ((covered > box[:2]) & (covered < box[2:])).all(axis=1).any()
                and not any((box[:2] < other[2:]).all() and (other[:2] < box[2:]).all() for other in boxes)
            ):
                x, y = axes.transAxes.inverted().transform(position)
                label.set_position((x, y))
                boxes.append(box)
                break
        else:
            label.remove()


def label_ends_right(axes: Axes, x: float, heights: Array, texts: Sequence[str], colours: Sequence[str]) -> None:
    """List the texts to the right of the axes at the heights of their lines' ends, spread apart to be readable."""
    if len(texts) > 36:
        return  # more would not fit above each other
    order = np.argsort(heights, kind="stable")
    low, high = axes.get_ylim()
    step = (high - low) / max(24, len(texts))
    # Isotonic regression: the nearest heights that are a step apart. Heights that collide share the mean of their run.
    runs: list[list[float]] = []
    for rank, height in enumerate(heights[order]):
        runs.append([float(height) - rank * step])
        while len(runs) > 1 and np.mean(runs[-2]) > np.mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    spread = np.array([np.mean(run) for run in runs for _ in run])
    spread = np.clip(spread, low, high - (len(texts) - 1) * step) + np.arange(len(texts)) * step
    for index, height in zip(order, spread, strict=True):
        axes.annotate(
            texts[index], (x, heights[index]), xytext=(1.06, (height - low) / (high - low)),
            textcoords="axes fraction", fontsize=8, color=INK, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[index], "linewidth": 0.7, "alpha": 0.7},
        )  # fmt: skip
