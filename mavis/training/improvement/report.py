"""The report of an iteration: reward, KL and J_w of its rollouts, goal by goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.critics.head_critic import HeadCritic
from mavis.training.improvement.features import Features
from mavis.training.rollout_tensors import ShardedRollouts


@dataclass(frozen=True)
class IterationReport:
    """The report of one iteration of `improve`.

    Args:
        iteration: counted from 0.
        rollouts: number of sampled responses.
        rewards: mean weighted reward w·R, normalised, of the rollouts sampled for each goal; the goals are the
            objectives alone, and under `conditioned` also MIXTURES, whose weights were drawn.
        kl: mean KL to the reference of those rollouts, nats per sequence.
        goal: J_w = w·R − KL/β of those rollouts.
        goal_error: the standard error of that mean.
        explained: per objective, share of the returns' variance that the fitted heads explain on held-out rollouts;
            None where those do not vary.
        losses: held-out error before the first epoch and after each.
        critic: folder of the critic after the fit.
        cut_off: share of the responses that were cut off at the limit.

    Examples:
        A finished iteration holds its report as `report.json`.

        >>> from mavis.training import IterationReport
        >>> stored = {
        ...     "iteration": 1, "rollouts": 8192, "rewards": {"positive": 1.5}, "kl": {"positive": 2.0},
        ...     "goal": {"positive": 1.0}, "goal_error": {"positive": 0.02}, "explained": {"positive": 0.4},
        ...     "losses": [1.0, 0.7, 0.6], "critic": "run/iteration-1/critic",
        ... }
        >>> report = IterationReport(**stored)
        >>> report.goal["positive"] == report.rewards["positive"] - report.kl["positive"] / 4.0  # β
        True
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
    cut_off: float = 0.0

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return the metrics to log, by group and name."""
        return {"reward": self.rewards, "kl": self.kl, "goal": self.goal, "explained": self.explained}


def share_cut_off(shards: Sequence[Any], end_ids: set[int]) -> float:
    """Compute the share of responses that did not end with an end token."""
    ended = [bool(ids) and ids[-1] in end_ids for shard in shards for ids in shard["response_ids"]]
    return 1 - sum(ended) / len(ended)


def find_problems(report: IterationReport, before: IterationReport | None) -> list[str]:
    """Say what makes an iteration look useless, and what to change.

    Args:
        report: of the iteration.
        before: of the iteration before it; None for the first.

    Returns:
        One text for each problem: responses that were cut off, values that explain nothing, J that fell by more than
        two standard errors.

    Examples:
        >>> from mavis.training.improvement.report import IterationReport, find_problems
        >>> report = IterationReport(0, 64, {}, {}, {}, {}, {"short": -0.25}, [1.0, 1.1], "run/critic", cut_off=0.9)
        >>> len(find_problems(report, None))
        2
    """
    problems = []
    if report.cut_off > _MOST_CUT_OFF:
        problems.append(
            f"iteration {report.iteration}: {report.cut_off:.0%} of the responses were cut off at max_new_tokens, so "
            "objectives saw no end and could not tell lengths apart. Raise decoding.max_new_tokens."
        )
    nothing = [name for name, share in report.explained.items() if share is not None and share <= 0]
    if nothing:
        problems.append(
            f"iteration {report.iteration}: the values of {', '.join(nothing)} explain nothing of the rewards of "
            "held-out rollouts, so the tilt will not steer there. Use more rollouts (improvement.rollouts), or fewer "
            "epochs."
        )
    for name, goal in report.goal.items() if before is not None else ():
        if before is None or name not in before.goal:
            continue
        error = math.hypot(report.goal_error[name], before.goal_error[name])
        # The first iteration samples without a tilt, so later ones should not fall below it either.
        if goal < before.goal[name] - 2 * error:
            problems.append(
                f"iteration {report.iteration}: J of {name} fell from {before.goal[name]:.3g} to {goal:.3g} "
                f"(standard error {error:.2g}). Use more rollouts, or a smaller beta."
            )
    return problems


def find_rare_rewards(objectives: Sequence[str], raw_rewards: Tensor) -> list[str]:
    """Say which objectives hardly vary over the reference policy's responses, and what to change.

    Args:
        objectives: their names.
        raw_rewards: (N, M), in their order.

    Examples:
        >>> import torch
        >>> from mavis.training.improvement.report import find_rare_rewards
        >>> len(find_rare_rewards(["rare"], torch.eye(64)[:, :1]))
        1
    """
    problems = []
    for name, column in zip(objectives, raw_rewards.T, strict=True):
        share = float(column.unique(return_counts=True)[1].max()) / len(column)
        if share > _MOST_ALIKE:
            problems.append(
                f"iteration 0: {name} gives {share:.1%} of the responses the same reward, so that little can be learnt "
                "from it. Use prompts or an objective whose rewards differ, or more rollouts (improvement.rollouts)."
            )
    return problems


_MOST_CUT_OFF = 0.5
_MOST_ALIKE = 0.95

MIXTURES = "mixtures"
"""The name of the goal of rollouts that weigh several objectives."""


def means_by_goal(critic: HeadCritic, features: ShardedRollouts[Features], beta: float) -> dict[str, dict[str, float]]:
    """Average reward, KL and J_w of an iteration's rollouts, goal by goal.

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
        is_single = weights.max(1).values > 1 - 1e-6
        weighted = (weights * rewards).sum(1)
        groups += [
            (name, is_single & (weights.argmax(1) == m), weighted, strength) for m, name in enumerate(critic.objectives)
        ]
        groups.append((MIXTURES, ~is_single, weighted, strength))
    else:
        strength = torch.full_like(kl, beta)
        groups += [(name, is_evaluated[:, m], rewards[:, m], strength) for m, name in enumerate(critic.objectives)]
    means: dict[str, dict[str, float]] = {"rewards": {}, "kl": {}, "goal": {}, "goal_error": {}}
    for name, rows, reward, betas in groups:
        if not bool(rows.any()):
            continue
        goal = reward[rows] - kl[rows] / betas[rows]
        means["rewards"][name] = float(reward[rows].mean())
        means["kl"][name] = float(kl[rows].mean())
        means["goal"][name] = float(goal.mean())
        means["goal_error"][name] = float(goal.std(correction=0)) / math.sqrt(len(goal))
    return means
