"""Calibration of a critic: KL to the reference along β, measured after training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mavis.critics.trained_decoding import TrainedDecoding
from mavis.errors import CriticError, check_number, warn_user

DEFAULT_KL = 2.0
"""The KL in nats per response that generation aims at if neither β nor a KL budget is given."""


def calibration_directions(objectives: int) -> Tensor:
    """Return the weights at which KL is measured: every objective alone, then every pair in equal parts.

    Their number is that of the free entries of a symmetric matrix over the objectives.

    Args:
        objectives: M, the number of objectives.

    Returns:
        (M(M+1)/2, M) float64, rows sum to one.
    """
    eye = torch.eye(objectives, dtype=torch.float64)
    pairs = [(eye[i] + eye[j]) / 2 for i, j in combinations(range(objectives), 2)]
    return torch.stack([*eye, *pairs])


@dataclass(frozen=True)
class Calibration:
    """KL to the reference as a function of β, for each of the `calibration_directions`.

    Truncating the policy to its candidates costs KL even without a tilt: the floor. The relations between β and KL
    below are about the KL in excess of the floor.

    Args:
        betas: G strengths, ascending, > 0, in 1 / reward.
        kl: D lists of G mean KLs in nats per response, D = M(M+1)/2.
        max_new_tokens: maximum length of the measured responses.
        top_k: the number of candidates; None for all tokens.
        temperature: T of the measured responses.
        floor: mean KL of the policy truncated to its candidates without a tilt, in nats per response, ≥ 0.
        lengths: S lengths in tokens, ascending, up to which the KL of longer responses was measured as well; empty if
            it was not.
        kl_at_lengths: for each of these lengths, its `kl`.
        floor_at_lengths: for each of these lengths, its `floor`.

    Raises:
        CriticError: if `betas` is not ascending and positive, or `kl` does not match it.

    Examples:
        >>> import mavis, torch
        >>> calibration = mavis.Critic.from_pretrained(mavis.embedded.critic_path()).calibration
        >>> [round(beta, 2) for beta in calibration.betas]
        [0.67, 1.33, 2.67, 5.33, 10.67]

        The β that spends 2 nats per response on both objectives in equal parts:

        >>> round(calibration.beta(torch.tensor([0.5, 0.5]), target_kl=2.0), 1)
        4.7
    """

    betas: list[float]
    kl: list[list[float]]
    max_new_tokens: int
    top_k: int | None
    temperature: float = 1.0
    floor: float = 0.0
    lengths: list[int] = field(default_factory=list)
    kl_at_lengths: list[list[list[float]]] = field(default_factory=list)
    floor_at_lengths: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = [self.betas, *self.kl] if isinstance(self.kl, list) else [None]
        sound = all(
            isinstance(row, list) and len(row) == len(self.betas) and all(isinstance(x, int | float) for x in row)
            for row in rows
        )
        if not sound or not self.kl or sorted(set(self.betas)) != self.betas or self.betas[0] <= 0:
            raise CriticError(
                f"calibration is betas={self.betas!r}, kl={self.kl!r}; expected ascending betas > 0 and a KL for each "
                "of them in every direction.",
                "calibrate the critic again.",
            )
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Check that the lengths ascend and come with KLs of the same sweep."""
        lengths, counts = self.lengths, {len(self.lengths), len(self.kl_at_lengths), len(self.floor_at_lengths)}
        shape = [len(self.kl), *(len(row) for row in self.kl)]
        shapes = [[len(kl), *(len(row) for row in kl)] for kl in self.kl_at_lengths]
        if len(counts) > 1 or lengths != sorted(set(lengths)) or any(other != shape for other in shapes):
            raise CriticError(
                f"calibration lengths is {lengths}; expected ascending lengths, each with a KL for every strength and "
                "direction, and a floor.",
                "calibrate the critic again.",
            )

    def at_length(self, max_new_tokens: int) -> Calibration:
        """Return the calibration for responses of up to another number of tokens.

        The KL spent by token n is interpolated linearly between the lengths that were measured, from 0 at n = 0; beyond
        the longest it goes on at the rate of the last stretch.

        Args:
            max_new_tokens: n ≥ 1.
        """
        if max_new_tokens == self.max_new_tokens:
            return self
        lengths = [0, *(self.lengths or [self.max_new_tokens])]
        measured = torch.tensor(self.kl_at_lengths or [self.kl], dtype=torch.float64)
        floors = torch.tensor(self.floor_at_lengths or [self.floor], dtype=torch.float64)
        measured = torch.cat([torch.zeros_like(measured[:1]), measured])
        floors = torch.cat([torch.zeros_like(floors[:1]), floors])
        above = next((at for at, length in enumerate(lengths) if length >= max_new_tokens), len(lengths) - 1)
        share = (max_new_tokens - lengths[above - 1]) / (lengths[above] - lengths[above - 1])
        kl, floor = (torch.lerp(values[above - 1], values[above], share) for values in (measured, floors))
        return replace(self, kl=kl.tolist(), floor=float(floor), max_new_tokens=max_new_tokens)

    @property
    def decoding(self) -> TrainedDecoding:
        """The candidates, the temperature and the length that it was measured with."""
        return TrainedDecoding(self.top_k, self.temperature, self.max_new_tokens)

    def beta(self, weights: Tensor, target_kl: float) -> float:
        """Compute the β that spends a KL budget at given weights.

        For small tilts, KL(λ) = ½ λᵀ Σ λ is a quadratic form. So the surface of KL κ is modelled as an ellipsoid
        λᵀ C λ = κ through the measured directions, and β = sqrt(κ / wᵀ C w).

        Args:
            weights: (M,) finite, not all zero.
            target_kl: κ > 0 in nats per response, including the floor.

        Returns:
            β ≥ 0.

        Raises:
            CriticError: if β exceeds the measured range, or the budget does not exceed the floor.
        """
        hint = "2.0 nats per response is a moderate budget."
        check_number(CriticError, hint, low=0, strict=True, target_kl=target_kl)
        if target_kl <= self.floor:
            raise CriticError(
                f"target_kl is {target_kl:g}, but truncating the policy to top_k={self.top_k} candidates alone costs "
                f"{self.floor:.3g} nats.",
                "choose a larger target, or train with more candidates (top_k=None for all tokens).",
            )
        beta, max_beta = self._beta(weights, target_kl - self.floor), self._max_beta(weights)
        if beta > max_beta * (1 + 1e-9):
            reached = self.floor
            for excess in torch.linspace(0, target_kl - self.floor, 201, dtype=torch.float64).tolist()[1:]:
                if self._beta(weights, excess) > max_beta:
                    break
                reached = self.floor + excess
            raise CriticError(
                f"target_kl is {target_kl:g}, which at weights {weights.tolist()} takes beta {beta:.3g}; the critic "
                f"was calibrated up to {max_beta:.3g}, which reaches {reached:.2g} nats.",
                "choose a smaller target, or pass beta instead.",
            )
        return beta

    def beta_at_length(self, weights: Tensor, target_kl: float, max_new_tokens: int) -> float:
        """Compute the β that spends a KL budget over responses of up to another length; see `beta` and `at_length`.

        Responses that are shorter than the measured ones may be too short to spend the budget. They get the largest
        measured β, with a warning.

        Args:
            weights: (M,) finite, not all zero.
            target_kl: κ > 0 in nats per response, including the floor.
            max_new_tokens: n ≥ 1.

        Raises:
            CriticError: as `beta` does.
        """
        measured, max_beta = self.at_length(max_new_tokens), self._max_beta(weights)
        if max_new_tokens < self.max_new_tokens:
            self.beta(weights, target_kl)  # refuses a budget that longer responses could not spend either
            if measured._beta(weights, target_kl - measured.floor) > max_beta:
                warn_user(
                    f"target_kl is {target_kl:g}, but {max_new_tokens} tokens are too few to spend it at the "
                    f"calibrated strengths; the largest of them, beta {max_beta:.3g}, is used."
                )
                return max_beta
        return measured.beta(weights, target_kl)

    def default_beta(self, weights: Tensor) -> float:
        """Compute the β that spends `DEFAULT_KL` above the floor at given weights, at most the largest measured one.

        Args:
            weights: (M,) finite, not all zero.
        """
        return min(self._beta(weights, DEFAULT_KL), self._max_beta(weights))

    def max_kl(self) -> float:
        """Return the largest KL that was reached in all measured directions."""
        return min(max(row) for row in self.kl)

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON-compatible data."""
        return asdict(self)

    def _max_beta(self, weights: Tensor) -> float:
        """Return the largest measured β for these weights; the measured directions sum to one."""
        return self.betas[-1] / float(weights.abs().sum())

    def _beta(self, weights: Tensor, target: float) -> float:
        """Compute the β at which KL exceeds the floor by a target, inf if none does."""
        values = torch.tensor([self._curvature(row, target) for row in self.kl], dtype=torch.float64)
        form = _quadratic_form(len(weights), values)
        # Sampling noise can make the form indefinite; clamping its eigenvalues gives the nearest semidefinite one.
        eigenvalues, vectors = torch.linalg.eigh(form)
        along = vectors.T @ weights.double().cpu()
        spread = float((eigenvalues.clamp_min(0.0) * along.square()).sum())
        return math.sqrt(target / spread) if spread > 1e-12 * target else math.inf

    def _curvature(self, kl: list[float], target: float) -> float:
        """Return κ/β² at the β where a direction reaches κ above the floor; KL is extrapolated as quadratic in β."""
        # KL does not fall as β rises, but sampled means can; their running maximum does not.
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
    """Solve w_dᵀ C w_d = values_d for a symmetric C: single objectives give the diagonal, pairs the rest."""
    form = torch.diag(values[:objectives])
    for value, (i, j) in zip(values[objectives:], combinations(range(objectives), 2), strict=True):
        form[i, j] = form[j, i] = 2 * value - (form[i, i] + form[j, j]) / 2
    return form
