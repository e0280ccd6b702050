"""Statistics of a set of responses: means and standard errors, diversity, and calibration of predicted values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mavis.errors import EvaluationError


def mean_and_stderr(values: ArrayLike) -> tuple[float, float | None]:
    """Compute a mean and its standard error.

        mean ± std / √N,   std with N − 1 in the denominator

    Args:
        values: (N,) finite and independent: one per prompt. Responses to the same prompt are not independent,
            so average them first, or the error is underestimated.

    Returns:
        The mean and its standard error, in the units of `values`; the error is None for a single value.

    Raises:
        EvaluationError: if `values` is empty, not (N,) or not finite.

    Source: definition above.
    """
    column = _checked("values", values)
    mean = float(column.mean())
    return mean, float(column.std(ddof=1) / math.sqrt(len(column))) if len(column) > 1 else None


def distinct_2(responses: Iterable[str]) -> float:
    """Compute the share of distinct bigrams, over all responses together.

        distinct-2 = #distinct bigrams / #bigrams

    It falls as the text grows, so compare equal numbers of responses of similar length.

    Args:
        responses: texts; words are separated by whitespace, and no bigram spans two texts.

    Returns:
        From near 0 (the same words over and over) to 1 (no bigram twice); 0 without any bigram.

    Source: Li et al. 2016, "A diversity-promoting objective function for neural conversation models", section
    5, with bigrams instead of tokens in the denominator so that 1 can be reached.
    """
    bigrams = [bigram for response in responses for bigram in pairwise(response.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


@dataclass(frozen=True)
class CalibrationRow:
    """One bin of similar predictions.

    Attributes:
        predicted: mean prediction.
        observed: mean outcome.
        count: number of predictions, ≥ 1.
    """

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """How predicted values compare with outcomes; `dataclasses.asdict` converts it to JSON.

    Attributes:
        rows: bins in the order of their predictions.
        slope: of the least-squares line of observed on predicted; 1 is calibrated; below 1 the predictions are
            overconfident. None if all predictions are equal.
        intercept: of the same line, 0 is calibrated; None if all predictions are equal.
        r_squared: 1 − Σ (observed − predicted)² / Σ (observed − mean observed)², of the predictions
            themselves, not of the fitted line: negative if the mean predicts better. None if all outcomes are equal.
    """

    rows: tuple[CalibrationRow, ...]
    slope: float | None
    intercept: float | None
    r_squared: float | None


def calibration_table(predicted: ArrayLike, observed: ArrayLike, bins: int = 10) -> Calibration:
    """Compare predicted values with observed rewards, in bins of similar predictions.

    Args:
        predicted: (N,) values, finite.
        observed: (N,) rewards of the same responses, finite, in the same units.
        bins: number of bins, ≥ 1, with edges at the quantiles of `predicted`. Equal predictions share a bin,
            so there may be fewer.

    Returns:
        The bins, and slope, intercept and R² over all N.

    Raises:
        EvaluationError: if the shapes differ, are not (N,) or are empty, a number is not finite, or `bins` < 1.

    Source: definitions in `Calibration`.
    """
    forecasts, outcomes = _checked("predicted", predicted), _checked("observed", observed)
    if forecasts.shape != outcomes.shape or bins < 1:
        raise EvaluationError(
            f"predicted has length {len(forecasts)}, observed {len(outcomes)} and bins is {bins}; "
            "expected equal lengths and bins ≥ 1.",
            "pass one prediction and one outcome per response.",
        )
    edges = np.unique(np.quantile(forecasts, np.arange(1, bins) / bins))
    bin_of = np.searchsorted(edges, forecasts, side="right")
    rows = tuple(
        CalibrationRow(float(forecasts[inside].mean()), float(outcomes[inside].mean()), int(inside.sum()))
        for inside in (bin_of == index for index in np.unique(bin_of))
    )
    slope = intercept = r_squared = None
    if np.ptp(forecasts) > 0:
        centred = forecasts - forecasts.mean()
        slope = float((centred * outcomes).sum() / (centred**2).sum())
        intercept = float(outcomes.mean() - slope * forecasts.mean())
    if np.ptp(outcomes) > 0:
        spread = ((outcomes - outcomes.mean()) ** 2).sum()
        r_squared = float(1.0 - ((outcomes - forecasts) ** 2).sum() / spread)
    return Calibration(rows, slope, intercept, r_squared)


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or len(column) == 0 or not np.isfinite(column).all():
        raise EvaluationError(
            f"{name} has shape {column.shape} with {int((~np.isfinite(column)).sum())} values that are not finite, "
            "expected a non-empty list of finite numbers.",
            "drop what could not be measured, and evaluate at least one prompt.",
        )
    return column
