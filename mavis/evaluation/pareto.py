"""Pareto fronts: the points of a sweep that no other point beats, and the volume that they dominate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mavis.errors import EvaluationError


@dataclass(frozen=True)
class ParetoFront:
    """The non-dominated points of a sweep.

    Attributes:
        reference_point: by objective, the corner from which the hypervolume is measured.
        hypervolume: of all points above it.
        non_dominated: for each point, whether it belongs to the front.
    """

    reference_point: dict[str, float]
    hypervolume: float
    non_dominated: list[bool]


def pareto_front(rewards: Sequence[Mapping[str, float]]) -> ParetoFront:
    """Find the front, and its hypervolume above one standard deviation below the reference policy's mean.

    Args:
        rewards: normalised rewards by objective, for each point.
    """
    corner = dict.fromkeys(rewards[0], -1.0)
    points = np.array([list(point.values()) for point in rewards])
    return ParetoFront(corner, hypervolume(points, list(corner.values())), non_dominated(points).tolist())


def non_dominated(rewards: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other point matches in every objective and beats in one.

    Args:
        rewards: (G, M) reward of G points in M objectives; finite, more is better.

    Returns:
        (G,) True where the point belongs to the front; of equal points all or none do.

    Raises:
        EvaluationError: if `rewards` is not (G, M) or not finite.

    Source: Pareto dominance, computed by `moocore.is_nondominated`.
    """
    import moocore

    points = _checked(rewards)
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    mask: NDArray[np.bool_] = np.asarray(moocore.is_nondominated(points, maximise=True, keep_weakly=True), bool)
    return mask


def hypervolume(rewards: ArrayLike, reference_point: ArrayLike) -> float:
    """Compute the volume that the points dominate above a reference point.

        HV = volume( ∪_g { z : reference_point ≤ z ≤ rewards_g } )

    Only volumes above the same reference point can be compared, so there is no default for it.

    Args:
        rewards: (G, M) reward of G points in M objectives; finite, more is better. Points that are not above the
            reference point in every objective add nothing.
        reference_point: (M,) the corner from which volume is measured, finite, in the units of `rewards`.

    Returns:
        The volume, ≥ 0, in the product of the objectives' units; 0 for no points.

    Raises:
        EvaluationError: if `rewards` is not (G, M), `reference_point` is not (M,), or either is not finite.

    Source: Zitzler and Thiele (1998), computed by `moocore.hypervolume`.
    """
    import moocore

    points = _checked(rewards)
    corner = np.asarray(reference_point, dtype=np.float64)
    if corner.shape != points.shape[1:] or not np.isfinite(corner).all():
        raise EvaluationError(
            f"reference_point is {corner.tolist()}, expected {points.shape[1]} finite numbers, one per objective.",
            "use the same point for all fronts that are compared, below all of them.",
        )
    if len(points) == 0:
        return 0.0
    return float(moocore.hypervolume(points, ref=corner, maximise=True))


def _checked(rewards: ArrayLike) -> NDArray[np.float64]:
    points = np.asarray(rewards, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] == 0:
        raise EvaluationError(
            f"rewards has shape {points.shape}, expected (points, objectives).", "pass one row per point."
        )
    if not np.isfinite(points).all():
        row = int(np.argwhere(~np.isfinite(points))[0, 0])
        raise EvaluationError(
            f"rewards is {points[row].tolist()} in row {row}, expected finite numbers.",
            "drop the points that could not be measured.",
        )
    return points
