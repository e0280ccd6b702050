"""The common style of all plots, without pyplot, so that the user's own figures and backend do not change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mavis.evaluation.line_labels import INK
from mavis.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _DPI = 8.0, 150  # inches and dots per inch: 1200 pixels
FAINT, SHADE = "#8a8a8a", "#f1f1f1"
# The palette of Okabe and Ito, distinguishable with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def new_figure(height: float) -> Figure:
    """Create an empty figure of the common width.

    Args:
        height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically, in the format that the path's suffix names; PNG without one."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=_DPI)


def style_axes(axes: Axes) -> None:
    """Mute spines and ticks, so that the data stand out."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
