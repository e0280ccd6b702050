"""Grids of weights on the simplex, against lists written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis.errors import WeightsError
from mavis.math.simplex import simplex_grid


def test_two_objectives_in_quarters() -> None:
    assert simplex_grid(2, 4).tolist() == [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]


def test_three_objectives_in_halves() -> None:
    assert simplex_grid(3, 2).tolist() == [
        [1.0, 0.0, 0.0],
        [0.5, 0.5, 0.0],
        [0.5, 0.0, 0.5],
        [0.0, 1.0, 0.0],
        [0.0, 0.5, 0.5],
        [0.0, 0.0, 1.0],
    ]


@given(st.integers(1, 5), st.integers(1, 6))
def test_counts_sums_corners_and_no_row_twice(objectives: int, divisions: int) -> None:
    grid = simplex_grid(objectives, divisions)
    assert grid.shape == (math.comb(divisions + objectives - 1, objectives - 1), objectives)
    assert grid.dtype == torch.float64
    assert torch.allclose(grid.sum(1), torch.ones(len(grid)).double())
    assert bool((grid >= 0).all())
    rows = {tuple(row) for row in grid.tolist()}
    assert len(rows) == len(grid)
    assert rows >= {tuple(row) for row in torch.eye(objectives).tolist()}
    assert grid.tolist() == sorted(grid.tolist(), reverse=True)


@pytest.mark.parametrize(("objectives", "divisions"), [(0, 3), (2, 0), (-1, 1)])
def test_nothing_to_divide_is_refused(objectives: int, divisions: int) -> None:
    wrong = f"objectives is {objectives}" if objectives < 1 else f"divisions is {divisions}"
    with pytest.raises(WeightsError, match=f"{wrong}, expected a whole number ≥ 1"):
        simplex_grid(objectives, divisions)
