from __future__ import annotations

import math
import struct
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from mavis.errors import EvaluationError
from mavis.evaluation.plots import plot_front, plot_frontier
from mavis.math.simplex import simplex_grid

Row = dict[str, Any]


def sweep(objectives: list[str], divisions: int = 4, betas: tuple[float, ...] = (1.0, 2.0, 4.0)) -> list[Row]:
    """Synthetic rows: a reference row, then rewards whose gain grows with √KL in the direction of the weights."""
    rows: list[Row] = [
        {
            "weights": dict.fromkeys(objectives, 0.0),
            "beta": 0.0,
            "rewards": dict.fromkeys(objectives, 0.0),
            "rewards_stderr": dict.fromkeys(objectives, 0.03),
            "kl": 0.0,
        }
    ]
    for weights in simplex_grid(len(objectives), divisions).tolist():
        for beta in betas:
            kl = 0.2 * beta * sum(weight**2 for weight in weights)
            gain = [math.sqrt(2 * kl) * (weight - 0.3) for weight in weights]
            rows.append(
                {
                    "weights": dict(zip(objectives, weights, strict=True)),
                    "beta": beta,
                    "rewards": dict(zip(objectives, gain, strict=True)),
                    "rewards_stderr": dict.fromkeys(objectives, 0.03),
                    "kl": kl,
                }
            )
    return rows


def limits(rows: list[Row], efficiency: float | None = 0.62, effective: float = 60.0) -> list[Row]:
    """A limit per choice of weights, whose effective sample size falls to `effective`."""
    kl = np.linspace(0.0, 2.0, 20)
    return [
        {
            "weights": weights,
            "kl": kl.tolist(),
            "reward": np.sqrt(2 * kl).tolist(),
            "effective_sample_size": np.linspace(500.0, effective, 20).tolist(),
            "target_kl": 0.5,
            "efficiency": efficiency,
        }
        for weights in {tuple(row["weights"].items()): row["weights"] for row in rows[1:]}.values()
    ]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header, after decoding the whole image."""
    pixels = imread(path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert pixels.shape[:2] == (height, width)
    assert pixels[..., :3].std() > 0.01  # something is drawn
    return width, height


def texts_overlap(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure whose boxes overlap: titles, labels, ticks and legends."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        legend = axes.get_legend()
        texts += [
            *axes.texts,
            axes.xaxis.label,
            axes.yaxis.label,
            *([] if legend is None else legend.get_texts()),
        ]
        titles = (child for child in axes.get_children() if isinstance(child, Text))
        texts += [title for title in titles if title.get_text() == axes.get_title(loc="left")]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            texts += [text for place, text in ticks if low <= place <= high and axis.get_visible()]
    # An annotation's own extent would include its arrow.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_text()]
    return [
        (first, second)
        for (first, one), (second, two) in combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 0.5 and min(one.y1, two.y1) - max(one.y0, two.y0) > 0.5
    ]


@pytest.mark.parametrize("divisions", [1, 10])
def test_front_of_two_objectives(tmp_path: Path, divisions: int) -> None:
    figure = plot_front(tmp_path / "front.png", sweep(["helpful", "harmless"], divisions), ["helpful", "harmless"])
    assert png_size(tmp_path / "front.png") == (1200, 840)
    axes = figure.axes[0]
    assert [axes.get_xlabel(), axes.get_ylabel()] == [
        "helpful (normalised reward)",
        "harmless (normalised reward)",
    ]
    assert "β = 1, 2, 4" in axes.get_title(loc="left")
    labels = [text.get_text() for text in axes.texts]
    assert {"1 / 0", "0 / 1"} <= set(labels)
    assert len(labels) == divisions + 1
    assert texts_overlap(figure) == []


def test_the_non_dominated_points_are_ringed(tmp_path: Path) -> None:
    points = {0.0: (0.0, 0.0), 1.0: (0.5, 0.2), 2.0: (1.0, 0.1), 3.0: (0.9, 0.1)}
    rows = [
        {"weights": {"a": 0.5, "b": 0.5}, "beta": beta, "rewards": dict(zip("ab", point, strict=True))}
        for beta, point in points.items()
    ]
    figure = plot_front(tmp_path / "front.png", rows, ["a", "b"])
    (ringed,) = (line for line in figure.axes[0].lines if line.get_label() == "not dominated")
    assert np.allclose(ringed.get_xydata(), [[0.5, 0.2], [1.0, 0.1]])


@pytest.mark.parametrize("objectives", [["a", "b", "c"], ["helpful", "harmless", "short", "polite"]])
def test_front_of_more_objectives(tmp_path: Path, objectives: list[str]) -> None:
    figure = plot_front(tmp_path / "front.png", sweep(objectives, 2), objectives)
    assert png_size(tmp_path / "front.png") == (1200, 840)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == objectives
    assert len(axes.texts) == math.comb(2 + len(objectives) - 1, 2)
    assert texts_overlap(figure) == []


def test_a_front_without_reference_or_errors_is_drawn(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("weights", "beta", "rewards")} for row in sweep(["a", "b"])[1:]]
    plot_front(tmp_path / "front.png", rows, ["a", "b"])
    assert png_size(tmp_path / "front.png") == (1200, 840)


@pytest.mark.parametrize("divisions", [1, 4])
def test_frontier_titles_hold_the_efficiency(tmp_path: Path, divisions: int) -> None:
    rows = sweep(["positive", "dialogue"], divisions)
    figure = plot_frontier(tmp_path / "frontier.png", rows, limits(rows))
    assert png_size(tmp_path / "frontier.png")[0] == 1200
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == divisions + 1
    assert all(title.endswith("\nefficiency 0.62 at KL 0.5") for title in titles)
    assert titles[0].startswith("positive 1\n")
    assert texts_overlap(figure) == []


def test_best_of_n_is_drawn_where_the_panel_reaches(tmp_path: Path) -> None:
    rows = sweep(["a", "b"], 1)
    best = [{"n": 2, "kl": 0.1, "reward": 0.3}, {"n": 4, "kl": 0.2, "reward": 0.5}, {"n": 8, "kl": 99.0, "reward": 1.0}]
    figure = plot_frontier(
        tmp_path / "frontier.png", rows, [dict(limit) | {"best_of_n": best} for limit in limits(rows)]
    )
    for axes in figure.axes:
        (drawn,) = (line for line in axes.lines if line.get_label() == "best of n, at n times the cost: n = 2, 4")
        assert np.allclose(drawn.get_xydata(), [[0.1, 0.3], [0.2, 0.5]])


def test_an_unknown_efficiency_is_not_a_number(tmp_path: Path) -> None:
    rows = sweep(["a", "b"], 1)
    figure = plot_frontier(tmp_path / "frontier.png", rows, limits(rows, efficiency=None))
    assert figure.axes[0].get_title(loc="left") == "a 1\nefficiency not measured at KL 0.5"


def test_long_titles_are_wrapped(tmp_path: Path) -> None:
    rows = sweep(["positive sentiment", "dialogue share", "short sentences"], 2)
    figure = plot_frontier(tmp_path / "frontier.png", rows, limits(rows))
    assert texts_overlap(figure) == []


@pytest.mark.parametrize(("effective", "is_dashed"), [(60.0, False), (5.0, True)])
def test_the_limit_is_dashed_where_it_rests_on_few_rollouts(tmp_path: Path, effective: float, is_dashed: bool) -> None:
    rows = sweep(["a", "b"], 1, (1.0, 10.0))  # up to KL 2, the end of the limit
    figure = plot_frontier(tmp_path / "frontier.png", rows, limits(rows, effective=effective))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert ("optimal frontier, effective sample size < 50" in labels) == is_dashed
    assert "optimal frontier" in labels


def test_frontier_reads_reward_and_error_from_the_weights_or_from_the_row(tmp_path: Path) -> None:
    rows = sweep(["a", "b"], 2, (2.0,))
    rows[1] |= {"reward": 5.0, "reward_stderr": 0.25}
    figure = plot_frontier(tmp_path / "frontier.png", rows, [])
    (given, mixed) = (axes.containers[0] for axes in figure.axes[:2])
    assert isinstance(given, ErrorbarContainer)
    assert isinstance(mixed, ErrorbarContainer)
    assert np.allclose(given.lines[0].get_xydata(), [[rows[1]["kl"], 5.0]])
    (bar,) = given.lines[2][0].get_segments()
    assert np.allclose(bar[:, 1], [4.75, 5.25])
    middle = rows[2]["rewards"]
    assert np.allclose(mixed.lines[0].get_ydata(), (middle["a"] + middle["b"]) / 2)
    assert figure.axes[0].get_title(loc="left") == "a 1"


def test_files_other_than_png(tmp_path: Path) -> None:
    rows = sweep(["a", "b"], 1)
    plot_front(tmp_path / "front.svg", rows, ["a", "b"])
    assert "<svg" in (tmp_path / "front.svg").read_text(encoding="utf-8")
    plot_front(tmp_path / "front", rows, ["a", "b"])
    assert png_size(tmp_path / "front")[0] == 1200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front", "front.svg"]


def test_the_users_matplotlib_settings_do_not_change(tmp_path: Path) -> None:
    settings, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    rows = sweep(["a", "b"], 1)
    plot_front(tmp_path / "front.png", rows, ["a", "b"])
    plot_frontier(tmp_path / "frontier.png", rows, limits(rows))
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_rows_that_cannot_be_plotted_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    rows = sweep(["a", "b"], 1)
    with pytest.raises(EvaluationError, match="at least 2 objectives"):
        plot_front(tmp_path / "front.png", rows, ["a"])
    with pytest.raises(EvaluationError, match="no reward of 'c', only of: a, b"):
        plot_front(tmp_path / "front.png", rows, ["a", "c"])
    with pytest.raises(EvaluationError, match="nothing to draw: none of 1 rows"):
        plot_front(tmp_path / "front.png", rows[:1], ["a", "b"])
    with pytest.raises(EvaluationError, match="has kl None"):
        plot_frontier(tmp_path / "frontier.png", [{**rows[1], "kl": None}], [])
    rows[1]["rewards"]["a"] = math.nan
    with pytest.raises(EvaluationError, match="a nan"):
        plot_front(tmp_path / "front.png", rows, ["a", "b"])
    assert list(tmp_path.iterdir()) == []
