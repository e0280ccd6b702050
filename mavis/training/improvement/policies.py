"""Which policies an iteration evaluates: the weights and strengths of its rollouts, and of relabelled earlier ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mavis.policies import Prompt
from mavis.rollouts import RolloutPlan, RolloutSettings, draw_prompts, load_shards
from mavis.training.improvement.settings import ImprovementSettings

_SINGLE_OBJECTIVE_SHARE = 0.3
"""Share of the drawn weights that are one objective alone: a uniform draw from the simplex never hits its corners."""


def sampling_of(iteration: int, settings: ImprovementSettings) -> RolloutSettings:
    """Return the sampling settings of an iteration, which has a seed of its own."""
    return replace(settings.sampling, seed=settings.sampling.seed + iteration)


def plan_iteration(
    iteration: int, prompts: Sequence[Prompt], objectives: int, settings: ImprovementSettings
) -> RolloutPlan:
    """Plan the rollouts of an iteration: prompts in a fresh order, each with the policy that answers it.

    Args:
        iteration: counted from 0; iteration 0 samples from the reference policy.
        prompts: to draw from.
        objectives: M.
        settings: of the run.
    """
    rows = draw_prompts(prompts, settings.rollouts, settings.sampling.seed + iteration)
    if iteration == 0:
        return RolloutPlan.reference(rows, objectives)
    return RolloutPlan(rows, *choose_policies(len(rows), objectives, settings, [settings.sampling.seed + iteration]))


def relabelled_shards(
    folder: Path,
    iteration: int,
    earlier: int,
    prompts: Sequence[Prompt],
    objectives: int,
    settings: ImprovementSettings,
) -> list[Any]:
    """Load the rollouts of an earlier iteration, each relabelled with a policy of this one.

    Args:
        folder: of the run.
        iteration: whose policies the rollouts are relabelled with.
        earlier: the iteration that sampled them.
        prompts: of the run.
        objectives: M.
        settings: of the run.
    """
    plan, sampling = plan_iteration(earlier, prompts, objectives, settings), sampling_of(earlier, settings)
    shards = load_shards(plan, folder / f"iteration-{earlier}" / "rollouts", sampling)
    seed = [settings.sampling.seed, iteration, earlier]
    weights, betas = choose_policies(len(plan.prompts), objectives, settings, seed)
    start, relabelled = 0, []
    for shard in shards:
        rows = slice(start, start := start + len(shard))
        shard = shard.remove_columns(["weights", "beta"]).add_column("weights", weights[rows].tolist())
        relabelled.append(shard.add_column("beta", betas[rows].tolist()))
    return relabelled


def choose_policies(
    rows: int, objectives: int, settings: ImprovementSettings, seed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Choose the policies to be evaluated: weights (N, M) and β (N,), float64.

    `conditioned` draws them, see `draw_policies`; `independent` goes through the objectives in turn at the fixed β.
    """
    if settings.composition == "conditioned":
        return draw_policies(rows, objectives, settings, seed)
    own = torch.eye(objectives, dtype=torch.float64)[torch.arange(rows) % objectives]
    return own, torch.full((rows,), settings.beta, dtype=torch.float64)


def draw_policies(
    rows: int, objectives: int, settings: ImprovementSettings, seed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Draw weights uniformly from the simplex, some from its corners, and β log-uniformly from its range.

    Args:
        rows: N.
        objectives: M.
        settings: give the range of β.
        seed: of the draw.

    Returns:
        Weights (N, M), rows sum to one, and β (N,), both float64.
    """
    source = np.random.default_rng(seed)
    weights = torch.from_numpy(source.dirichlet(np.ones(objectives), rows))
    corners = torch.eye(objectives, dtype=torch.float64)[torch.from_numpy(source.integers(objectives, size=rows))]
    single = torch.from_numpy(source.random(rows)) < _SINGLE_OBJECTIVE_SHARE
    min_beta, max_beta = settings.strengths
    logs = source.uniform(math.log(min_beta), math.log(max_beta), rows).tolist()
    # np.exp rounds differently on different CPUs, which would break resuming elsewhere and runs on mixed machines.
    betas = torch.tensor([math.exp(log) for log in logs], dtype=torch.float64)
    return torch.where(single[:, None], corners, weights), betas
