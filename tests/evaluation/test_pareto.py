from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis.errors import EvaluationError
from mavis.evaluation.pareto import hypervolume, non_dominated


def test_non_dominated_by_hand_with_duplicates() -> None:
    rewards = [
        [3.0, 1.0],  # best in the first
        [2.0, 2.0],
        [2.0, 2.0],  # its equal stays too
        [1.0, 3.0],  # best in the second
        [2.0, 1.0],  # dominated by three
        [3.0, 0.0],  # as good in the first, worse in the second
        [2.0, 1.0],  # equal points are marked alike
    ]
    assert non_dominated(rewards).tolist() == [True, True, True, True, False, False, False]


def test_non_dominated_of_one_point_no_point_and_one_objective() -> None:
    assert non_dominated([[1.0, 2.0, 3.0]]).tolist() == [True]
    assert non_dominated(np.empty((0, 2))).tolist() == []
    assert non_dominated([[1.0], [2.0], [2.0]]).tolist() == [False, True, True]


coarse_points = st.integers(2, 4).flatmap(
    lambda objectives: st.lists(
        st.lists(st.integers(-2, 2).map(float), min_size=objectives, max_size=objectives),
        min_size=1,
        max_size=12,
    )
)


@settings(max_examples=50)
@given(coarse_points)
def test_non_dominated_agrees_with_the_definition(rows: list[list[float]]) -> None:
    points = np.array(rows)
    dominated = [bool(((points >= point).all(1) & (points > point).any(1)).any()) for point in points]
    assert non_dominated(points).tolist() == [not is_dominated for is_dominated in dominated]


def test_hypervolume_of_three_points_by_hand() -> None:
    # Columns of width one above (0, 0): heights 3, 2 and 1.
    points = [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    assert hypervolume(points, [0.0, 0.0]) == pytest.approx(6.0)
    assert hypervolume(points, [-1.0, 0.0]) == pytest.approx(9.0)
    assert hypervolume(points, [1.0, 1.0]) == pytest.approx(1.0)  # only the middle one is above it in both


def test_hypervolume_of_three_points_in_three_objectives_by_hand() -> None:
    # Three bars of 2 × 1 × 1 that share their unit cube: 3 · 2 − 2.
    points = [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
    assert hypervolume(points, [0.0, 0.0, 0.0]) == pytest.approx(4.0)


def test_dominated_equal_and_too_low_points_add_no_volume() -> None:
    front = [[1.0, 3.0], [2.0, 2.0]]
    more = [*front, [1.0, 1.0], [2.0, 2.0], [-5.0, 9.0]]
    assert hypervolume(more, [0.0, 0.0]) == hypervolume(front, [0.0, 0.0])
    assert hypervolume([[-1.0, -1.0]], [0.0, 0.0]) == 0.0
    assert hypervolume(np.empty((0, 2)), [0.0, 0.0]) == 0.0


@settings(max_examples=50)
@given(coarse_points)
def test_only_the_front_counts_for_the_hypervolume(rows: list[list[float]]) -> None:
    points = np.array(rows)
    corner = [-3.0] * points.shape[1]
    assert hypervolume(points, corner) == pytest.approx(hypervolume(points[non_dominated(points)], corner))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_refused_by_row(bad: float) -> None:
    rewards = [[0.0, 1.0], [bad, 1.0]]
    with pytest.raises(EvaluationError, match="row 1"):
        non_dominated(rewards)
    with pytest.raises(EvaluationError, match="row 1"):
        hypervolume(rewards, [0.0, 0.0])
    with pytest.raises(EvaluationError, match="reference_point"):
        hypervolume([[0.0, 1.0]], [0.0, bad])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(EvaluationError, match="points, objectives"):
        non_dominated([1.0, 2.0])
    for corner in ([0.0], 0.0, [0.0, 0.0, 0.0]):
        with pytest.raises(EvaluationError, match="2 finite numbers"):
            hypervolume([[0.0, 1.0]], corner)
