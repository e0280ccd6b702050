"""The reliability plot of a reward model: how often it is right against how sure it says it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mavis.errors import EvaluationError
from mavis.evaluation.figure_style import FAINT, PALETTE, new_figure, style_axes, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_reliability(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot observed against stated accuracy; a calibrated model's points lie on the diagonal.

    Args:
        path: where to; the suffix names the format, PNG without one.
        rows: bins with `stated`, `observed`, `error` and `pairs`, as in `RewardModelReport.reliability`.

    Returns:
        The figure.

    Raises:
        EvaluationError: if there is no bin.
    """
    if not rows:
        raise EvaluationError("rows is empty.", "give the reliability of a report.")
    figure = new_figure(5.0)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1, linestyle="--")
    stated, observed, errors = ([row[name] for row in rows] for name in ("stated", "observed", "error"))
    axes.errorbar(stated, observed, yerr=errors, color=PALETTE[0], marker="o", capsize=3, linewidth=1.5)
    for row in rows:
        axes.annotate(
            f"{row['pairs']} pairs", (row["stated"], row["observed"]), (6, -12), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="accuracy that the scores state", ylabel="accuracy on held-out pairs", xlim=(0.48, 1.02))
    style_axes(axes)
    write_figure(figure, path)
    return figure
