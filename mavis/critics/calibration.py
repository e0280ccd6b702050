"""How far each strength of tilt moves the policy, measured once after training and stored in the critic."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mavis.errors import CriticError, check_number

DEFAULT_KL = 2.0
"""The distance, in nats per sequence, that a critic aims at when neither β nor a budget is given."""


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

    Cutting the policy to its candidates costs KL before anything is tilted: the floor. What is said of β and KL below
    holds for the KL above it.

    Args:
        betas: G strengths, ascending, > 0, in 1 / reward.
        kl: D lists of G mean KLs in nats per sequence, D = M(M+1)/2.
        max_new_tokens: length of the responses it was measured on.
        top_k: number of candidates it was measured with; None means all.
        temperature: T it was measured at.
        floor: mean KL of the policy that is cut to its candidates and not tilted, nats per sequence, ≥ 0.

    Raises:
        CriticError: if the numbers cannot be a sweep.
    """

    betas: list[float]
    kl: list[list[float]]
    max_new_tokens: int
    top_k: int | None
    temperature: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        rows = [self.betas, *self.kl] if isinstance(self.kl, list) else [None]
        sound = all(
            isinstance(row, list) and len(row) == len(self.betas) and all(isinstance(x, int | float) for x in row)
            for row in rows
        )
        if not sound or not self.kl or sorted(set(self.betas)) != self.betas or self.betas[0] <= 0:
            raise CriticError(
                f"calibration is betas={self.betas!r}, kl={self.kl!r}; expected ascending betas > 0 and as many KLs "
                "for each direction.",
                "calibrate the critic again.",
            )

    def beta(self, weights: Tensor, target_kl: float) -> float:
        """Find the strength that reaches a KL budget at some weights.

        At small tilts KL(λ) = ½ λᵀ Σ λ, a quadratic form; so the surface of equal KL is modelled as an ellipsoid
        λᵀ C λ = κ through the measured directions, and β = sqrt(κ / wᵀ C w).

        Args:
            weights: (M,) finite, not all zero.
            target_kl: κ > 0 in nats per sequence, the floor included.

        Returns:
            β ≥ 0.

        Raises:
            CriticError: if it takes a stronger tilt than was measured, or the candidates alone cost as much.
        """
        hint = "2.0 nats per sequence are a moderate budget."
        check_number(CriticError, hint, low=0, strict=True, target_kl=target_kl)
        if target_kl <= self.floor:
            raise CriticError(
                f"target_kl is {target_kl:g}, but cutting the policy to top_k={self.top_k} candidates alone costs "
                f"{self.floor:.3g} nats.",
                "choose a larger target, or train with more candidates (top_k=None makes every token one).",
            )
        beta, most = self._beta(weights, target_kl - self.floor), self._most(weights)
        if beta > most * (1 + 1e-9):
            reached = self.floor
            for excess in torch.linspace(0, target_kl - self.floor, 201, dtype=torch.float64).tolist()[1:]:
                if self._beta(weights, excess) > most:
                    break
                reached = self.floor + excess
            raise CriticError(
                f"target_kl is {target_kl:g}, which at weights {weights.tolist()} takes beta {beta:.3g}; the critic "
                f"was calibrated up to {most:.3g}, which reaches {reached:.2g} nats.",
                "choose a smaller target, or give beta directly.",
            )
        return beta

    def default_beta(self, weights: Tensor) -> float:
        """Return the β that goes `DEFAULT_KL` beyond the floor at some weights, or the strongest that was measured.

        Args:
            weights: (M,) finite, not all zero.
        """
        return min(self._beta(weights, DEFAULT_KL), self._most(weights))

    def reach(self) -> float:
        """Return the largest KL that every objective alone and every pair was measured to reach."""
        return min(max(row) for row in self.kl)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def _most(self, weights: Tensor) -> float:
        """The strongest β along these weights: directions were measured with weights that sum to one."""
        return self.betas[-1] / float(weights.abs().sum())

    def _beta(self, weights: Tensor, target: float) -> float:
        values = torch.tensor([self._curvature(row, target) for row in self.kl], dtype=torch.float64)
        form = _quadratic_form(len(weights), values)
        # Sampling noise can make the form indefinite; the nearest one that is not has its negative eigenvalues cut.
        eigenvalues, vectors = torch.linalg.eigh(form)
        along = vectors.T @ weights.double().cpu()
        spread = float((eigenvalues.clamp_min(0.0) * along.square()).sum())
        return math.sqrt(target / spread) if spread > 1e-12 * target else math.inf

    def _curvature(self, kl: list[float], target: float) -> float:
        """κ/β² where a direction goes κ beyond the floor; past its ends KL goes on as the quadratic it begins as."""
        # Sampling noise can make neighbours cross; KL cannot fall as β rises, so the running maximum is the estimate.
        above_floor = torch.tensor(kl, dtype=torch.float64) - self.floor
        rising = above_floor.clamp_min(0).cummax(0).values.tolist()
        if target <= rising[0]:
            return rising[0] / self.betas[0] ** 2
        if target > rising[-1]:
            return rising[-1] / self.betas[-1] ** 2
        above = next(at for at, value in enumerate(rising) if value >= target)
        x0, x1 = math.log(self.betas[above - 1]), math.log(self.betas[above])
        # A sampled KL can be exactly 0 at a tiny β; its logarithm only has to be finite.
        y0, y1 = (math.log(max(rising[at], 1e-12)) for at in (above - 1, above))
        return target / math.exp(2 * (x0 + (math.log(target) - y0) / (y1 - y0) * (x1 - x0)))


def _quadratic_form(objectives: int, values: Tensor) -> Tensor:
    """Solve w_dᵀ C w_d = values_d for the symmetric C; alone-directions give the diagonal, pairs the rest."""
    form = torch.diag(values[:objectives])
    for value, (i, j) in zip(values[objectives:], combinations(range(objectives), 2), strict=True):
        form[i, j] = form[j, i] = 2 * value - (form[i, i] + form[j, j]) / 2
    return form
