from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from mavis.errors import EvaluationError
from mavis.evaluation.statistics import CalibrationRow, calibration_table, distinct_2, mean_and_stderr


def test_mean_and_stderr_by_hand() -> None:
    # Deviations −1, 0, 1: variance 1, error 1 / √3.
    mean, stderr = mean_and_stderr([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert stderr == pytest.approx(1 / math.sqrt(3))


def test_a_single_value_has_no_error() -> None:
    assert mean_and_stderr([4.0]) == (4.0, None)


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [[1.0]]])
def test_values_without_a_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(EvaluationError, match="values has shape"):
        mean_and_stderr(values)


def test_distinct_2_by_hand() -> None:
    # a-b, b-a, a-b in the first, a-b in the second: two distinct ones among four.
    assert distinct_2(["a b a b", "a  b\n"]) == pytest.approx(0.5)
    assert distinct_2(["the cat sat", "on the mat"]) == 1.0


def test_distinct_2_does_not_cross_texts_and_is_zero_without_bigrams() -> None:
    assert distinct_2(["a", "b", ""]) == 0.0
    assert distinct_2([]) == 0.0


def test_calibration_by_hand() -> None:
    calibration = calibration_table([0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 2.0, 2.0], bins=2)
    assert calibration.rows == (CalibrationRow(0.5, 0.0, 2), CalibrationRow(2.5, 2.0, 2))
    # Covariance 4 over variance 5 (sums), line through the means (1.5, 1); residuals 1 + 1 of a spread of 4.
    assert calibration.slope == pytest.approx(0.8)
    assert calibration.intercept == pytest.approx(-0.2)
    assert calibration.r_squared == pytest.approx(0.5)
    assert json.loads(json.dumps(dataclasses.asdict(calibration)))["rows"][0]["count"] == 2


def test_a_calibrated_prediction_has_slope_one_and_equal_bins() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.normal(size=5000)
    calibration = calibration_table(predicted, predicted + generator.normal(size=5000))
    assert [row.count for row in calibration.rows] == [500] * 10
    # Standard errors 0.014 each: six of them, a false alarm in 10⁸ seeds, and the seed is fixed.
    assert calibration.slope == pytest.approx(1.0, abs=0.085)
    assert calibration.r_squared == pytest.approx(0.5, abs=0.085)
    assert all(row.predicted == pytest.approx(row.observed, abs=0.3) for row in calibration.rows)


def test_overconfident_predictions_show_in_the_slope() -> None:
    truth = np.linspace(-1, 1, 50)
    calibration = calibration_table(2 * truth + 1, truth)
    assert calibration.slope == pytest.approx(0.5)
    assert calibration.intercept == pytest.approx(-0.5)
    assert calibration.r_squared is not None
    assert calibration.r_squared < 0


def test_equal_predictions_share_a_bin_and_have_no_slope() -> None:
    calibration = calibration_table([1.0] * 20, np.arange(20.0))
    assert [row.count for row in calibration.rows] == [20]
    assert (calibration.slope, calibration.intercept) == (None, None)
    assert calibration_table([0.0] * 15 + [1.0] * 5, np.arange(20.0)).rows[0].count == 15
    assert calibration_table([0.0, 1.0], [2.0, 2.0]).r_squared is None


@pytest.mark.parametrize(("predicted", "bins"), [([1.0, 2.0, 3.0], 2), ([1.0, 2.0], 0)])
def test_unequal_lengths_and_no_bins_are_refused(predicted: list[float], bins: int) -> None:
    with pytest.raises(EvaluationError, match="expected equal lengths and bins"):
        calibration_table(predicted, [1.0, 2.0], bins)


def test_nan_is_refused() -> None:
    with pytest.raises(EvaluationError, match="observed has shape"):
        calibration_table([1.0, 2.0], [math.nan, 2.0])
