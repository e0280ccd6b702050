"""What one iteration came to, goal by goal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.critics.head_critic import HeadCritic
from mavis.training.improvement.features import Features
from mavis.training.rollout_tensors import ShardedRollouts


@dataclass(frozen=True)
class IterationReport:
    """What one iteration came to.

    Args:
        iteration: counted from 0.
        rollouts: responses that were sampled.
        rewards: mean weighted reward w·R, normalised, of the rollouts sampled for each goal; the goals are the
            objectives alone, and under `conditioned` also MIXTURES, whose weights were drawn.
        kl: mean KL to the reference of those rollouts, nats per sequence.
        goal: J_w = w·R − KL/β of those rollouts.
        goal_error: the standard error of that mean.
        explained: per objective, share of the returns' variance that the fitted heads explain on held-out rollouts;
            None where those do not vary.
        losses: held-out error before the first epoch and after each.
        critic: folder of the critic after the fit.
    """

    iteration: int
    rollouts: int
    rewards: dict[str, float]
    kl: dict[str, float]
    goal: dict[str, float]
    goal_error: dict[str, float]
    explained: dict[str, float | None]
    losses: list[float]
    critic: str

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return what trackers are told, by group and name."""
        return {"reward": self.rewards, "kl": self.kl, "goal": self.goal, "explained": self.explained}


MIXTURES = "mixtures"
"""What a report calls the rollouts whose weights lie between the objectives."""


def means_by_goal(critic: HeadCritic, features: ShardedRollouts[Features], beta: float) -> dict[str, dict[str, float]]:
    """Average what an iteration's rollouts earned and spent, goal by goal.

    Args:
        critic: gives the objectives and the composition.
        features: the rollouts of this iteration alone.
        beta: β of the `independent` composition.

    Returns:
        `rewards`, `kl`, `goal` and `goal_error` of `IterationReport`.
    """
    local = features.local_rollouts
    rewards, kl = features.all_gather(local.rewards.double()), features.all_gather(local.kl.double().sum(1))
    lam, is_evaluated = features.all_gather(local.lam), features.all_gather(local.is_evaluated.to(torch.uint8)).bool()
    groups: list[tuple[str, Tensor, Tensor, Tensor]] = []  # name, rows, weighted reward, β
    if critic.conditioned:
        strength = lam.double().sum(1)
        weights = lam / strength[:, None]
        alone = weights.max(1).values > 1 - 1e-6
        weighted = (weights * rewards).sum(1)
        groups += [
            (name, alone & (weights.argmax(1) == m), weighted, strength) for m, name in enumerate(critic.objectives)
        ]
        groups.append((MIXTURES, ~alone, weighted, strength))
    else:
        strength = torch.full_like(kl, beta)
        groups += [(name, is_evaluated[:, m], rewards[:, m], strength) for m, name in enumerate(critic.objectives)]
    named: dict[str, dict[str, float]] = {"rewards": {}, "kl": {}, "goal": {}, "goal_error": {}}
    for name, rows, reward, betas in groups:
        if not bool(rows.any()):
            continue
        goal = reward[rows] - kl[rows] / betas[rows]
        named["rewards"][name] = float(reward[rows].mean())
        named["kl"][name] = float(kl[rows].mean())
        named["goal"][name] = float(goal.mean())
        named["goal_error"][name] = float(goal.std(correction=0)) / math.sqrt(len(goal))
    return named
