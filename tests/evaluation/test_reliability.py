"""The reliability plot shows each bin where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mavis.errors import EvaluationError
from mavis.evaluation.reliability import plot_reliability


def test_each_bin_is_a_point_with_its_error(tmp_path: Path) -> None:
    rows = [
        {"stated": 0.55, "observed": 0.5, "error": 0.1, "pairs": 25},
        {"stated": 0.95, "observed": 0.9, "error": 0.05, "pairs": 36},
    ]
    figure = plot_reliability(tmp_path / "plot.png", rows)
    axes = figure.axes[0]
    assert [tuple(point) for point in axes.lines[1].get_xydata()] == [(0.55, 0.5), (0.95, 0.9)]
    assert [text.get_text() for text in axes.texts] == ["25 pairs", "36 pairs"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_no_bin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="rows is empty"):
        plot_reliability(tmp_path / "plot.png", [])
    assert not list(tmp_path.iterdir())
