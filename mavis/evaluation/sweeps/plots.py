"""A plot of the runs of a hyperparameter sweep: a line per run, a panel per metric."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mavis.errors import EvaluationError
from mavis.evaluation.figure_style import FAINT, PALETTE, new_figure, style_axes, write_figure
from mavis.evaluation.line_labels import INK
from mavis.evaluation.sweeps.runs import FINISHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[str, list[float | None]]


def plot_runs(path: str | os.PathLike[str], runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the metrics of every run, best first: frontier efficiency where it was measured, else reward and KL.

    Args:
        path: where to; the suffix names the format (`.png`, `.svg`, `.pdf`), PNG without one.
        runs: from `gather_runs`; unfinished ones are drawn hollow, those without metrics as empty lines.

    Returns:
        The figure.

    Raises:
        EvaluationError: if no run has metrics.
    """
    panels = _panels(runs)
    if not panels:
        raise EvaluationError(f"none of {len(runs)} runs has metrics to plot.", "wait until one has finished.")
    first = panels[0][1]
    order = sorted(range(len(runs)), key=lambda index: -1e300 if (value := first[index]) is None else value)
    columns = 2 if len(panels) % 2 == 0 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure((1.0 + 0.27 * len(runs)) * lines + 0.3)
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.remove()
    heights = range(len(runs))
    for axis, (title, values) in zip(axes, panels, strict=False):
        style_axes(axis)
        axis.grid(axis="y", color=FAINT, linewidth=0.3)
        axis.set_axisbelow(True)
        axis.set_title(textwrap.fill(title, 60 // columns), fontsize=9, color=INK, loc="left", parse_math=False)
        for height, index in zip(heights, order, strict=True):
            if (value := values[index]) is not None:
                fill = PALETTE[0] if runs[index]["state"] == FINISHED else "white"
                axis.plot(value, height, "o", color=PALETTE[0], markerfacecolor=fill, markersize=5)
        axis.margins(x=0.08)
    axes[0].set_yticks(heights, [_label(runs[index]) for index in order], parse_math=False)
    axes[0].set_ylim(-0.6, len(runs) - 0.4)
    write_figure(figure, path)
    return figure


def _panels(runs: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Choose the panels, each with a title and a value per run."""
    targets = sorted({kl for run in runs for kl, share in run["efficiency"].items() if share is not None})
    if targets:
        return [
            (f"frontier efficiency at KL {kl:g}, mean over weights", [run["efficiency"].get(kl) for run in runs])
            for kl in targets
        ]
    goals = list(dict.fromkeys(goal for run in runs for goal in run["rewards"]))
    return [
        (f"{what} {goal}{unit}", [run[name].get(goal) for run in runs])
        for goal in goals
        for name, what, unit in (("rewards", "reward", " (normalised)"), ("kl", "KL", " (nats)"))
    ]


def _label(run: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in run["settings"].items() if value is not None)
    label = textwrap.shorten(settings or run["run"], 60, placeholder=" …")
    return label if run["state"] == FINISHED else f"{label} ({run['state']})"
