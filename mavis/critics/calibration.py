"""How far each strength of tilt moves the policy, measured once after training and stored in the critic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mavis.errors import CriticError

DEFAULT_KL = 2.0
"""The distance, in nats per sequence at equal weights, that a critic's default β aims at."""


def calibration_directions(objectives: int) -> Tensor:
    """List the weights to measure: every objective alone, then every pair in equal parts.

    These are as many as a symmetric matrix over the objectives has free entries.

    Returns:
        (M(M+1)/2, M) float64, rows sum to one.
    """
    eye = torch.eye(objectives, dtype=torch.float64)
    pairs = [(eye[i] + eye[j]) / 2 for i, j in combinations(range(objectives), 2)]
    return torch.stack([*eye, *pairs])


@dataclass(frozen=True)
class Calibration:
    """KL to the reference along β, for each of the `calibration_directions`.

    Args:
        betas: G strengths, ascending, > 0, in 1 / reward.
        kl: D lists of G mean KLs in nats per sequence, D = M(M+1)/2.
        max_new_tokens: length of the responses it was measured on.
        top_k: number of candidates it was measured with; None means all.
    """

    betas: list[float]
    kl: list[list[float]]
    max_new_tokens: int
    top_k: int | None

    def beta(self, weights: Tensor, target_kl: float) -> float:
        """Find the strength that reaches a KL budget at some weights.

        At small tilts KL(λ) = ½ λᵀ Σ λ, a quadratic form; so the surface of equal KL is modelled as an ellipsoid
        λᵀ C λ = κ through the measured directions, and β = sqrt(κ / wᵀ C w).

        Args:
            weights: (M,) finite, not all zero.
            target_kl: κ > 0 in nats per sequence.

        Returns:
            β ≥ 0.

        Raises:
            CriticError: if κ lies outside what was measured.
        """
        directions = calibration_directions(len(weights))
        along = torch.tensor([self._beta_along(row, target_kl) for row in self.kl], dtype=torch.float64)
        curvature = _quadratic_form(directions, target_kl / along.square())
        spread = float(weights.double() @ curvature @ weights.double())
        if spread <= 0:
            raise CriticError(
                f"target_kl={target_kl:g} has no calibrated beta at weights {weights.tolist()}.",
                "give beta directly.",
            )
        return math.sqrt(target_kl / spread)

    def default_beta(self) -> float:
        """Return the β that reaches `DEFAULT_KL` at equal weights, or the closest that was measured."""
        objectives = _objectives_of(len(self.kl))
        lowest, highest = self.range()
        target = min(max(DEFAULT_KL, lowest), highest)
        if target <= 0:  # an untrained critic moves nothing, whatever β is
            return self.betas[-1]
        return self.beta(torch.full((objectives,), 1 / objectives), target)

    def range(self) -> tuple[float, float]:
        """Return the KLs, lowest and highest, that every direction reaches."""
        return max(row[0] for row in self.kl), min(max(row) for row in self.kl)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "betas": self.betas,
            "kl": self.kl,
            "max_new_tokens": self.max_new_tokens,
            "top_k": self.top_k,
        }

    def _beta_along(self, kl: list[float], target: float) -> float:
        # Sampling noise can make neighbours cross; KL cannot fall as β rises, so the running maximum is the estimate.
        rising = torch.tensor(kl, dtype=torch.float64).cummax(0).values
        low, high = self.range()
        if not (math.isfinite(target) and target > 0) or target > high * (1 + 1e-9):
            raise CriticError(
                f"target_kl is {target:g}, but the critic was calibrated from {low:.3g} to {high:.3g} nats.",
                "choose a target in that range, or give beta directly.",
            )
        if target <= rising[0]:  # below the first point KL is quadratic in β
            return self.betas[0] * math.sqrt(target / float(rising[0]))
        above = int((rising >= target * (1 - 1e-12)).nonzero()[0])
        x0, x1 = math.log(self.betas[above - 1]), math.log(self.betas[above])
        # A sampled KL can be exactly 0 at a tiny β; its logarithm only has to be finite.
        y0, y1 = (math.log(max(float(rising[at]), 1e-12)) for at in (above - 1, above))
        share = (math.log(target) - y0) / (y1 - y0) if y1 > y0 else 1.0
        return math.exp(x0 + share * (x1 - x0))


def _objectives_of(directions: int) -> int:
    return (math.isqrt(8 * directions + 1) - 1) // 2


def _quadratic_form(directions: Tensor, values: Tensor) -> Tensor:
    """Solve w_dᵀ C w_d = values_d for the symmetric C; alone-directions give the diagonal, pairs the rest."""
    objectives = directions.shape[1]
    form = torch.diag(values[:objectives])
    for value, (i, j) in zip(values[objectives:], combinations(range(objectives), 2), strict=True):
        form[i, j] = form[j, i] = 2 * value - (form[i, i] + form[j, j]) / 2
    return form
