"""Frontier efficiency of a sweep, and the limit that it is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mavis.errors import EvaluationError
from mavis.evaluation.sweep_row import SweepRow
from mavis.math.best_of_n import best_of_n
from mavis.math.frontier import frontier_efficiency, optimal_frontier, optimal_reward_at, reward_at

LIMIT_BETAS = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-2, 2, 81, dtype=torch.float64)])
"""The β at which the optimal frontier is tabulated."""

BEST_OF = (2, 4, 8, 16)
"""The n for which best-of-n is reported next to it; n times the forward passes of one response."""


@dataclass(frozen=True)
class TargetEfficiency:
    """The reward and the frontier efficiency of one choice of weights at a target KL.

    Attributes:
        weights: preference weights by objective.
        kl: the target, in nats per response.
        reward: w·R at that KL, interpolated along β; None outside the measured KLs.
        efficiency: None where there is no reward, or the optimal frontier rests on too few effective samples.
        reason: why the efficiency is None, and what would give one.
    """

    weights: dict[str, float]
    kl: float
    reward: float | None
    efficiency: float | None
    reason: str | None = None


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n sampling from the reference policy, without any tilt.

    Attributes:
        n: number of responses of which the best is taken.
        reward: expected w·R of the best.
        kl: to the reference policy, in nats per response.
    """

    n: int
    reward: float
    kl: float


@dataclass(frozen=True)
class RewardLimit:
    """The best reward w·R that is possible for one choice of weights, along β.

    Attributes:
        weights: preference weights by objective.
        kl: KL to the reference policy in nats per response, increasing.
        reward: best reachable reward at each KL.
        effective_sample_size: of the reference rollouts behind each reward, see `mavis.math.optimal_frontier`.
        best_of_n: for several n, what best-of-n earns.
    """

    weights: dict[str, float]
    kl: list[float]
    reward: list[float]
    effective_sample_size: list[float]
    best_of_n: list[BestOfN]


def efficiency_at(rewards: Tensor, ours: float | None, kl: float) -> float | None:
    """Compute the frontier efficiency at one KL.

    Args:
        rewards: (P, N) rewards w·R of reference rollouts.
        ours: the reward at this KL, or None.
        kl: in nats per response.

    Returns:
        The efficiency; None if `ours` is None or the limit rests on too few effective samples.
    """
    if ours is None:
        return None
    try:
        return frontier_efficiency(ours, float(rewards.mean()), optimal_reward_at(rewards, kl))
    except EvaluationError:
        return None


def target_efficiencies(
    sweeps: Sequence[Sequence[SweepRow]],
    rewards: Tensor,
    grid: Tensor,
    objectives: Sequence[str],
    target_kls: Sequence[float],
) -> list[TargetEfficiency]:
    """Interpolate the sweep over β of each choice of weights at the target KLs.

    Args:
        sweeps: G lists of rows over β, each beginning with the untilted policy.
        rewards: (P, N, M) normalised rewards of reference rollouts.
        grid: (G, M) weights.
        objectives: M names.
        target_kls: in nats per response.
    """
    found = []
    for weights, sweep in zip(grid, sweeps, strict=True):
        kl = torch.tensor([row.kl for row in sweep], dtype=torch.float64)
        ours = torch.tensor([row.weighted_reward(weights.tolist()) for row in sweep], dtype=torch.float64)
        for target in target_kls:
            reached = reward_at(kl, ours, target)
            efficiency = efficiency_at(rewards @ weights, reached, target)
            by_objective = dict(zip(objectives, weights.tolist(), strict=True))
            reason = None if efficiency is not None else _reason(rewards @ weights, kl, reached, target)
            found.append(TargetEfficiency(by_objective, float(target), reached, efficiency, reason))
    return found


def _reason(rewards: Tensor, kl: Tensor, reached: float | None, target: float) -> str:
    """Say why there is no efficiency at a target KL."""
    if reached is None:
        return f"the sweep spends {float(kl.min()):.3g} to {float(kl.max()):.3g} nats; sweep other evaluation.betas."
    try:
        frontier_efficiency(reached, float(rewards.mean()), optimal_reward_at(rewards, target))
    except EvaluationError as error:
        return f"{error.message} Use more evaluation.reference_samples, or a smaller target KL."
    return "unknown"


def reward_limits(rewards: Tensor, grid: Tensor, objectives: Sequence[str]) -> list[RewardLimit]:
    """Tabulate the optimal frontier and best-of-n for each choice of weights.

    Args:
        rewards: (P, N, M) normalised rewards of reference rollouts.
        grid: (G, M) weights.
        objectives: M names.
    """
    limits = []
    for weights in grid:
        weighted = rewards @ weights
        frontier = optimal_frontier(weighted, LIMIT_BETAS)
        limits.append(
            RewardLimit(
                weights=dict(zip(objectives, weights.tolist(), strict=True)),
                kl=frontier.kl.tolist(),
                reward=frontier.reward.tolist(),
                effective_sample_size=frontier.effective_sample_size.tolist(),
                best_of_n=[BestOfN(n, *best_of_n(weighted, n)) for n in BEST_OF if n <= rewards.shape[1]],
            )
        )
    return limits
