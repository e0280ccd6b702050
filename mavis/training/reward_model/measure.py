"""How well scores agree with choices, how well they know how well, and how much of them is length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 5


def share_right(differences: Tensor) -> Tensor:
    """Return 1 where a difference is positive, ½ where it is 0, and 0 where it is negative."""
    return (differences > 0).double() + (differences == 0).double() / 2


def clustered_error(values: Tensor, groups: Sequence[int]) -> float:
    """Estimate the standard error of a mean of values that are alike within groups.

        SE = √(Σ_g (Σ_{i∈g} (x_i − x̄))²) / n

    Args:
        values: (N,).
        groups: of each value.

    Source: Liang & Zeger 1986, "Longitudinal data analysis using generalized linear models", for a mean.
    """
    index = torch.tensor(groups)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, values - values.mean())
    return math.sqrt(float(sums.square().sum())) / len(values)


def accuracy_error(right: Tensor, groups: Sequence[int]) -> float:
    """Estimate the standard error of a share: binomial, or clustered by prompt if that is larger.

    One success and one failure are added to the binomial one, so that ten of ten is not known exactly.

    Args:
        right: (N,) of 0, ½ and 1.
        groups: the prompt of each.
    """
    n = len(right)
    share = (float(right.sum()) + 1) / (n + 2)
    return max(math.sqrt(share * (1 - share) / n), clustered_error(right, groups))


def length_fit(scores: Tensor, characters: Tensor) -> tuple[float | None, float | None]:
    """Fit the differences of scores by differences of length, through the origin.

        slope = Σ s·l / Σ l²,   correlation = Σ s·l / √(Σ s² Σ l²)

    Neither changes if the two responses of a pair are swapped.

    Args:
        scores: (N,) score of the chosen response minus that of the rejected.
        characters: (N,) the same of their lengths.

    Returns:
        The correlation and the slope per 100 characters; None if all lengths are equal, the correlation also if all
        scores are.
    """
    product, lengths, energy = (
        float(x) for x in ((scores * characters).sum(), characters.square().sum(), scores.square().sum())
    )
    if not lengths:
        return None, None
    return (product / math.sqrt(lengths * energy) if energy else None), 100 * product / lengths


def reliability(scores: Tensor) -> tuple[list[dict[str, Any]], float]:
    """Compare stated with observed accuracy, in bins of equal width.

    Args:
        scores: (N,) score of the chosen response minus that of the rejected; σ(|score|) is the stated accuracy.

    Returns:
        Bins that hold any pair, with `stated` and `observed` accuracy, the latter's `error`, and `pairs`; and the mean
        distance between the two, weighted by pairs.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", expected calibration error.
    """
    stated, right = torch.sigmoid(scores.abs()), share_right(scores)
    which = ((stated - 0.5) * 2 * _BINS).long().clamp_max(_BINS - 1)
    rows: list[dict[str, Any]] = []
    distance = 0.0
    for index in range(_BINS):
        inside = which == index
        if pairs := int(inside.sum()):
            row = {"stated": float(stated[inside].mean()), "observed": float(right[inside].mean())}
            error = accuracy_error(right[inside], range(pairs))
            rows.append(row | {"error": error, "pairs": pairs})
            distance += pairs / len(scores) * abs(row["stated"] - row["observed"])
    return rows, distance


def measure(scores: Tensor, characters: Tensor, groups: Sequence[int], baseline: str) -> dict[str, Any]:
    """Measure what a report says about held-out pairs.

    Args:
        scores: (N,) score of the chosen response minus that of the rejected.
        characters: (N,) the same of their lengths.
        groups: the prompt of each pair.
        baseline: `longer` or `shorter`.
    """
    right, longer = share_right(scores), share_right(characters)
    by_length = longer if baseline == "longer" else 1 - longer
    bins, distance = reliability(scores)
    correlation, slope = length_fit(scores, characters)
    return {
        "accuracy": float(right.mean()),
        "accuracy_error": accuracy_error(right, groups),
        "longer_accuracy": float(longer.mean()),
        "longer_error": accuracy_error(longer, groups),
        "baseline": baseline,
        "baseline_accuracy": float(by_length.mean()),
        "gain": float((right - by_length).mean()),
        "gain_error": clustered_error(right - by_length, groups),
        "log_loss": float(-F.logsigmoid(scores).mean()),
        "calibration_error": distance,
        "reliability": bins,
        "length_correlation": correlation,
        "length_slope": slope,
    }
