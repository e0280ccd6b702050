"""Plots of a sweep: reward against reward over the weights, and reward against KL under the optimal frontier.

Both read *rows*, plain dicts as a `report.json` holds them, one per choice of weights and β:

    {"weights": {"positive": 0.5, "dialogue": 0.5},       preference weights by objective
     "beta": 2.0,                                         tilt strength; 0 is the reference policy
     "rewards": {"positive": 0.31, "dialogue": 0.52},     mean normalised reward by objective
     "rewards_stderr": {"positive": 0.02, ...},           optional: its standard error, None where unknown
     "reward": 0.41, "reward_stderr": 0.02,               optional: mean of w·R and its standard error
     "kl": 1.2}                                           KL to the reference, nats per response

A row with β = 0 or all weights 0 is the reference policy, whichever weights it was run for. Other keys are ignored.
Plots are 1200 pixels wide and drawn without pyplot, so the user's figures and backend do not change.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mavis.errors import EvaluationError
from mavis.evaluation.figure_style import FAINT, PALETTE, SHADE, new_figure, style_axes, write_figure
from mavis.evaluation.line_labels import INK, label_ends, label_ends_right
from mavis.evaluation.pareto import non_dominated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Key = tuple[tuple[str, float], ...]
Array = NDArray[np.float64]

_OURS, _LIMIT, _TARGET, _BEST = PALETTE[:4]


def plot_front(path: str | os.PathLike[str], rows: Sequence[Row], objectives: Sequence[str]) -> Figure:
    """Plot the rewards that a sweep over weights reaches, one objective against another.

    Two objectives: a point with error bars per row, a line per choice of weights from the reference policy along
    growing β, and the non-dominated points ringed on the edge of the region that they dominate. More objectives:
    parallel coordinates, a line per choice of weights at its largest β, bold where not dominated.

    Args:
        path: where to; the suffix names the format (`.png`, `.svg`, `.pdf`), PNG without one.
        rows: see above, `kl` is not needed; at least one that is not the reference policy.
        objectives: the M ≥ 2 objectives to draw, in this order.

    Returns:
        The figure.

    Raises:
        EvaluationError: if there are fewer than two objectives, no row to draw, or a row lacks a number.
    """
    if len(objectives) < 2:
        raise EvaluationError(
            f"objectives is {list(objectives)}, but a front needs at least 2 objectives.", "use plot_frontier instead."
        )
    figure = new_figure(5.6)
    (_draw_plane if len(objectives) == 2 else _draw_parallel)(figure, rows, list(objectives))
    write_figure(figure, path)
    return figure


def plot_frontier(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    limits: Sequence[Row],
    min_effective_sample_size: float = 50.0,
    truncated: Row | None = None,
) -> Figure:
    """Plot the reward w·R against the KL to the reference policy, under the optimal frontier.

    Args:
        path: where to; the suffix names the format (`.png`, `.svg`, `.pdf`), PNG without one.
        rows: see above. The error bar of a row without `reward` is Σ_m |w_m| · stderr_m, an upper bound.
        limits: at most one dict per choice of weights, `{"weights": {...}, "kl": [...], "reward": [...],
            "effective_sample_size": [...], "best_of_n": [{"n": 4, "kl": 0.6, "reward": 0.9}, ...], "target_kl": 1.5,
            "efficiency": 0.6}`: the optimal frontier over a sweep of β (lists of equal length) and, all optional,
            what best-of-n earns, the KL at which the frontier efficiency was read, and its value, None if unknown.
        min_effective_sample_size: below it the limit is dashed, as it rests on few rollouts.
        truncated: the row of the reference policy truncated to the candidates, where each sweep begins; None if every
            token is a candidate.

    Returns:
        The figure, with a panel per choice of weights whose title states the efficiency.

    Raises:
        EvaluationError: if there is no row to draw, or a row lacks a number.
    """
    sweeps, reference = _sweeps(rows), _reference(rows)
    limit_of = {_key(limit): limit for limit in limits}
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure = new_figure(0.9 + {1: 4.2, 2: 3.4, 3: 2.7}[columns] * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(sweeps) :]:
        panel.remove()
    betas, characters = _betas(sweeps), {1: 110, 2: 54, 3: 34}[columns]
    for panel, (key, sweep) in zip(panels, sweeps.items(), strict=False):
        title = ", ".join(f"{name} {weight:.3g}" for name, weight in sweep[0]["weights"].items() if weight)
        panel.set_title(textwrap.fill(title, characters), fontsize=9, color=INK, loc="left")
        _draw_panel(panel, sweep, betas, limit_of.get(key), reference, truncated, min_effective_sample_size)
    figure.supxlabel("KL to the reference policy (nats per response)", fontsize=9, color=INK)
    figure.supylabel("reward w·R (normalised)", fontsize=9, color=INK)
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    write_figure(figure, path)
    return figure


def _draw_panel(
    axes: Axes,
    sweep: Sequence[Row],
    betas: str,
    limit: Row | None,
    reference: Row | None,
    truncated: Row | None,
    min_effective_sample_size: float,
) -> None:
    """Draw one sweep over β, its limit and the reference policy."""
    style_axes(axes)
    weights: Mapping[str, float] = sweep[0]["weights"]
    kl = np.array([_number(row, "kl") for row in sweep])
    reward, error = np.array([_weighted(row, weights) for row in sweep]).T
    line = np.column_stack([kl, reward])
    visible = [reward - error, reward + error]
    if reference is not None:
        base = _weighted(reference, weights)[0]
        start = [0.0, base] if truncated is None else [_number(truncated, "kl"), _weighted(truncated, weights)[0]]
        line = np.vstack([start, line])
        visible.append(np.array([base]))
        axes.axhline(base, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.plot(*line.T, color=_OURS, linewidth=1.4, zorder=3)
    axes.errorbar(
        kl, reward, yerr=error, fmt="o", color=_OURS, markersize=4.5, capsize=2.5, elinewidth=1.2, zorder=4,
        label=f"tilted policy, β = {betas}",
    )  # fmt: skip
    if reference is not None:
        axes.plot(0.0, base, "D", color=INK, markersize=5, zorder=5, label="reference policy")
    limit = limit or {}
    target = limit.get("target_kl")
    right = 1.1 * max(*kl, 0.0 if target is None else float(target)) or 1.0
    if target is not None:
        efficiency = limit.get("efficiency")
        value = "not measured" if efficiency is None else f"{efficiency:.2f}"
        title = f"{axes.get_title(loc='left')}\nefficiency {value} at KL {float(target):g}"
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.axvline(target, color=_TARGET, linewidth=1.3, linestyle=(0, (4, 2)), zorder=1, label="target KL")
    if limit:
        visible.append(_draw_limit(axes, limit, right, min_effective_sample_size))
    best = [entry for entry in limit.get("best_of_n", ()) if float(entry["kl"]) <= right]
    if best:
        points = np.array([[entry["kl"], entry["reward"]] for entry in best], float)
        name = "best of n, at n times the cost: n = " + ", ".join(str(entry["n"]) for entry in best)
        axes.plot(*points.T, "x", color=_BEST, markersize=6, markeredgewidth=1.5, zorder=3, label=name)
        visible.append(points[:, 1])
    low, high = min(map(np.min, visible)), max(map(np.max, visible))
    margin = 0.08 * (high - low) or 0.5
    axes.set(xlim=(-0.04 * right, right), ylim=(low - margin, high + margin))


def _draw_limit(axes: Axes, limit: Row, right: float, min_effective_sample_size: float) -> Array:
    """Draw the optimal frontier up to KL `right`, dashed where it is unreliable; return its reward at both ends."""
    order = np.argsort(limit["kl"], kind="stable")
    order = order[: np.searchsorted(np.asarray(limit["kl"], float)[order], right) + 1]
    kl, reward, effective = (
        np.asarray(limit[name], float)[order] for name in ("kl", "reward", "effective_sample_size")
    )
    reliable = effective >= min_effective_sample_size
    # The last reliable point also starts the dashed line, which leaves no gap between the two.
    dashed = ~reliable | np.append(~reliable[1:], False)
    name, style = "optimal frontier", dict[str, Any](color=_LIMIT, linewidth=1.8, zorder=2)
    axes.plot(kl, np.where(reliable, reward, np.nan), label=name, **style)
    if not reliable.all():
        name += f", effective sample size < {min_effective_sample_size:g}"
        axes.plot(kl, np.where(dashed, reward, np.nan), label=name, linestyle=(0, (2, 1)), **style)
    return np.interp([0.0, right], kl, reward)


def _draw_plane(figure: Figure, rows: Sequence[Row], objectives: list[str]) -> None:
    """Draw two objectives against each other."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    sweeps, reference = _sweeps(rows), _reference(rows)
    axes, colours = figure.subplots(), _colours()
    style_axes(axes)
    origin = None if reference is None else _rewards(reference, objectives)[0]
    lines, bars = [], []
    for sweep in sweeps.values():
        rewards, errors = np.array([_rewards(row, objectives) for row in sweep]).swapaxes(0, 1)
        line = rewards if origin is None else np.vstack([origin, rewards])
        colour = colours(_share(sweep[0], objectives))
        axes.plot(*line.T, color=colour, linewidth=1.1, zorder=3)
        axes.errorbar(
            rewards[:, 0], rewards[:, 1], xerr=errors[:, 0], yerr=errors[:, 1], fmt="o", color=colour,
            markersize=4.5, elinewidth=0.9, zorder=4,
        )  # fmt: skip
        lines.append(line)
        for axis in np.eye(2):
            bars += list(np.stack([rewards - errors * axis, rewards + errors * axis], axis=1))
    if origin is not None:
        axes.plot(*origin, "D", color=INK, markersize=6.5, zorder=6, label="reference policy")
    points = np.unique(np.concatenate(lines), axis=0)  # the reference policy may be on the front as well
    axes.margins(0.12)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    staircase = _draw_staircase(axes, points[non_dominated(points)])
    title = f"Reward at preference weights {' / '.join(objectives)}\n"
    title += f"each line: one choice of weights, along β = {_betas(sweeps)}"
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel(f"{objectives[0]} (normalised reward)")
    axes.set_ylabel(f"{objectives[1]} (normalised reward)")
    axes.legend(loc="lower left", frameon=False, fontsize=8.5)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=axes, aspect=40, pad=0.02)
    bar.set_label(f"share of {objectives[1]} in the weights", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
    names = [_weights_label(sweep[0], objectives) for sweep in sweeps.values()]
    centre = points.mean(axis=0) if origin is None else origin
    label_ends(figure, axes, lines, names, centre, [*bars, staircase])


def _draw_staircase(axes: Axes, front: Array) -> Array:
    """Ring the non-dominated points, shade the region that they dominate, and return its edge."""
    front = np.unique(front, axis=0)  # sorted by the first objective, and so decreasing in the second
    x = np.concatenate([axes.get_xlim()[:1], np.repeat(front[:, 0], 2)])
    y = np.concatenate([np.repeat(front[:, 1], 2), axes.get_ylim()[:1]])
    axes.fill_between(x, y, y[-1], color=SHADE, linewidth=0, zorder=0)
    axes.plot(x, y, color=FAINT, linewidth=1.2, zorder=1)
    axes.plot(
        *front.T, "o", markersize=10, markerfacecolor="none", markeredgecolor=INK, zorder=5,
        label="not dominated",
    )  # fmt: skip
    return np.column_stack([x, y])


def _draw_parallel(figure: Figure, rows: Sequence[Row], objectives: list[str]) -> None:
    """Draw three or more objectives as parallel coordinates, a line per choice of weights."""
    sweeps, reference = _sweeps(rows), _reference(rows)
    axes, across = figure.subplots(), np.arange(len(objectives))
    style_axes(axes)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    farthest = [sweep[-1] for sweep in sweeps.values()]
    rewards, errors = np.array([_rewards(row, objectives) for row in farthest]).swapaxes(0, 1)
    origin = None if reference is None else _rewards(reference, objectives)[0]
    on_front = non_dominated(rewards if origin is None else np.vstack([rewards, origin]))
    main = [_main_objective(row, objectives) for row in farthest]
    for index, line in enumerate(rewards):
        axes.errorbar(
            across, line, yerr=errors[index], fmt="o-", color=main[index][1], markersize=4, capsize=2,
            linewidth=1.7 if on_front[index] else 0.8, alpha=1.0 if on_front[index] else 0.45, zorder=3,
        )  # fmt: skip
    for name, colour in dict(main).items():
        axes.plot([], [], "o-", color=colour, markersize=4, linewidth=1.7, label=name)
    if origin is not None:
        style = dict[str, Any](color=INK, markersize=5, linewidth=1.2, zorder=5)
        axes.plot(across, origin, "D--", label="reference policy", **style)
    axes.set_xticks(across, objectives)
    axes.set_xlim(-0.15, across[-1] + 0.05)
    axes.set_ylabel("reward (normalised)")
    axes.set_title(
        f"Reward at preference weights {' / '.join(objectives)}\n"
        "each line: one choice of weights at its largest β; bold: not dominated",
        fontsize=9.5, color=INK, loc="left",
    )  # fmt: skip
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    labels = [_weights_label(row, objectives) for row in farthest]
    label_ends_right(axes, across[-1], rewards[:, -1], labels, [colour for _, colour in main])


def _colours() -> Colormap:
    """Return viridis without its light end, which is hard to see on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.86, 256)))


def _sweeps(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Group the rows of tilted policies by weights, each group sorted by β."""
    sweeps: dict[Key, list[Row]] = {}
    for row in rows:
        if not _is_reference(row):
            sweeps.setdefault(_key(row), []).append(row)
    if not sweeps:
        raise EvaluationError(
            f"there is nothing to draw: none of {len(rows)} rows has non-zero β and weights.",
            "evaluate at least one choice of weights at one β > 0.",
        )
    return {key: sorted(sweep, key=lambda row: _number(row, "beta")) for key, sweep in sweeps.items()}


def _betas(sweeps: Mapping[Key, Sequence[Row]]) -> str:
    """List every β of the sweeps, for a legend."""
    betas = {float(row["beta"]) for sweep in sweeps.values() for row in sweep}
    return ", ".join(f"{beta:g}" for beta in sorted(betas))


def _reference(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if _is_reference(row)), None)


def _is_reference(row: Row) -> bool:
    return _number(row, "beta") == 0 or not _key(row)


def _key(row: Row) -> Key:
    """Identify a choice of weights: without zeros, in any order, up to rounding."""
    return tuple(sorted((name, round(float(weight), 9)) for name, weight in row["weights"].items() if weight))


def _weights_label(row: Row, objectives: Sequence[str]) -> str:
    return " / ".join(f"{row['weights'].get(name, 0.0):.3g}" for name in objectives)


def _share(row: Row, objectives: Sequence[str]) -> float:
    """Return the second of two objectives' share of the weights, from 0 to 1."""
    first, second = (abs(row["weights"].get(name, 0.0)) for name in objectives)
    return float(second / (first + second)) if first + second else 0.5


def _main_objective(row: Row, objectives: Sequence[str]) -> tuple[str, str]:
    """Name the objective with the largest weight, and its colour."""
    weights = [row["weights"].get(name, 0.0) for name in objectives]
    if weights.count(max(weights)) > 1:
        return "largest weight shared", FAINT
    index = weights.index(max(weights))
    return f"most weight on {objectives[index]}", PALETTE[index % len(PALETTE)]


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if value is None or not np.isfinite(value):
        raise EvaluationError(
            f"the row at weights {row.get('weights')} and β {row.get('beta')} has {name} {value!r}, expected a finite "
            "number.",
            "drop rows that could not be measured.",
        )
    return float(value)


def _rewards(row: Row, objectives: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return rewards and their standard errors by objective; an unknown error is 0 and not visible."""
    missing = [name for name in objectives if name not in row["rewards"]]
    if missing:
        raise EvaluationError(
            f"the row at weights {row['weights']} and β {row['beta']} has no reward of {missing[0]!r}, only "
            f"of: {', '.join(row['rewards'])}.",
            "plot objectives that every row was scored on.",
        )
    known = row.get("rewards_stderr") or {}
    errors = [float(known.get(name) or 0.0) for name in objectives]
    return [_number(row["rewards"], name) for name in objectives], errors


def _weighted(row: Row, weights: Mapping[str, float]) -> tuple[float, float]:
    """Return the reward w·R of a row and its standard error, or an upper bound of it."""
    if _key(row) == _key({"weights": weights}) and row.get("reward") is not None:
        return _number(row, "reward"), float(row.get("reward_stderr") or 0.0)
    names = [name for name, weight in weights.items() if weight]
    rewards, errors = _rewards(row, names)
    reward = sum(weights[name] * value for name, value in zip(names, rewards, strict=True))
    return reward, sum(abs(weights[name]) * error for name, error in zip(names, errors, strict=True))
