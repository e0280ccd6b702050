"""The responses of an evaluation: of the reference policy, of its top-k candidates, and of every tilt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic
from mavis.evaluation.settings import EvaluationSettings
from mavis.policies import Prompt
from mavis.rewards import Objective
from mavis.rollouts.collect import RolloutPlan, collect
from mavis.rollouts.sampling import RolloutSettings

Columns = dict[str, list[Any]]
"""Rollouts as `collect` stores them, one list per column."""


def reference_rollouts(
    policy: Any,
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Any]:
    """Sample the reference policy, from which the optimal frontier is computed.

    This needs no critic, so it can be done before one is trained.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: by name, in the critic's order.
        prompts: the evaluation prompts.
        folder: the one that `evaluate` will be given, as `folder` or as `reference`; it reads the rollouts from there.
        settings: the same as for `evaluate`.
        progress: see `collect`.

    Yields:
        Shards, see `collect`.
    """
    repeated = [prompt for prompt in prompts for _ in range(settings.reference_samples)]
    plan = RolloutPlan.reference(repeated, len(objectives))
    sampling = replace(settings.sampling, top_k=None)  # the limit is that of the untruncated policy
    yield from collect(policy, tokenizer, objectives, plan, Path(folder) / "reference", sampling, progress=progress)


def truncated_rollouts(
    policy: Any,
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
) -> Iterator[Any]:
    """Sample the reference policy truncated to the tilt's candidates, the β → 0 end of every sweep.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: by name, in the critic's order.
        prompts: the evaluation prompts.
        folder: the one that `evaluate` will be given; it reads the rollouts from there.
        settings: the same as for `evaluate`.

    Yields:
        Shards, see `collect`; none if every token is a candidate.
    """
    if settings.sampling.top_k is None:
        return
    plan = RolloutPlan.reference([prompt for prompt in prompts for _ in range(settings.samples)], len(objectives))
    sampling = _sweep_sampling(settings)
    yield from collect(policy, tokenizer, objectives, plan, Path(folder) / "cut", sampling, truncate_reference=True)


def tilted_rollouts(
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    grid: Tensor,
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Any]:
    """Sample the tilted policy at every point of the sweep: weights, then β, then prompt.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: tilts the policy.
        objectives: by name, in the critic's order.
        prompts: the evaluation prompts.
        grid: (G, M) weights.
        folder: the one that `evaluate` was given.
        settings: the same as for `evaluate`.
        progress: see `collect`.

    Yields:
        Shards, see `collect`.
    """
    rows = [
        (prompt, weights, beta)
        for weights in grid
        for beta in settings.betas
        for prompt in prompts
        for _ in range(settings.samples)
    ]
    plan = RolloutPlan(
        prompts=[prompt for prompt, _, _ in rows],
        weights=torch.stack([weights for _, weights, _ in rows]),
        betas=torch.tensor([beta for _, _, beta in rows], dtype=torch.float64),
    )
    yield from collect(
        policy,
        tokenizer,
        objectives,
        plan,
        Path(folder) / "sweep",
        _sweep_sampling(settings),
        critic=critic,
        progress=progress,
    )


def gather_columns(shards: Iterator[Any]) -> Columns:
    """Join the columns of all shards."""
    columns: Columns = {}
    for shard in shards:
        for name, values in shard[:].items():
            columns.setdefault(name, []).extend(values)
    return columns


def _sweep_sampling(settings: EvaluationSettings) -> RolloutSettings:
    return replace(settings.sampling, seed=settings.sampling.seed + 1)  # independent of the reference rollouts
