"""Measuring how far each strength moves the policy, so that users can ask for a distance."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mavis.critics import Calibration, Critic
from mavis.critics.calibration import calibration_directions
from mavis.rewards import Objective
from mavis.rollouts.collect import RolloutPlan, collect
from mavis.rollouts.sampler import GENERATE_SAMPLER, Sampler
from mavis.rollouts.sampling import RolloutSettings

BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)


def calibrate(
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: RolloutSettings,
    *,
    samples: int,
    betas: Sequence[float] = BETAS,
    sampler: Sampler = GENERATE_SAMPLER,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Sample under a grid of weights and β and, cut to the candidates, under none, and record the mean KL of each.

        kl[d][g] = mean over rollouts of Σ_t KL(π ‖ π_ref),   λ = betas[g] · direction[d]

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: to be calibrated; it is not changed.
        objectives: by name, in the critic's order.
        prompts: to sample from, in turn.
        folder: where the rollouts go; resumed if there are some.
        settings: how to sample; the same as will be decoded with.
        samples: rollouts for each pair of direction and β, ≥ 1.
        betas: ascending, > 0; for a conditioned critic they are scaled so as to end with the strongest that it was
            trained on.
        sampler: see `collect`.
        progress: called with the rollouts that are done and all there are.

    Returns:
        The calibration, to be stored in the critic.
    """
    most = float(critic.max_trained_lambda)
    if critic.conditioned and most:
        betas = [most * beta / betas[-1] for beta in betas]
    directions = calibration_directions(len(critic.objectives))
    grid = [(d, b, s) for d in range(len(directions)) for b in betas for s in range(samples)]
    plan = RolloutPlan(
        prompts=[prompts[s % len(prompts)] for _, _, s in grid],  # the same in every cell, so that cells compare
        weights=directions[[d for d, _, _ in grid]],
        betas=torch.tensor([b for _, b, _ in grid], dtype=torch.float64),
    )
    spent: list[float] = []
    cut: list[float] = []
    untilted = RolloutPlan.reference(plan.prompts[: samples * len(betas)], len(critic.objectives))
    total = len(grid) + (len(untilted.prompts) if settings.top_k is not None else 0)
    say = progress or (lambda done, total: None)
    if settings.top_k is not None:
        for shard in collect(
            policy,
            tokenizer,
            objectives,
            untilted,
            Path(folder) / "untilted",
            settings,
            truncate_reference=True,
            sampler=sampler,
            progress=lambda done, _: say(done, total),
        ):
            cut.extend(sum(row) for row in shard["kl"])
    for shard in collect(
        policy,
        tokenizer,
        objectives,
        plan,
        folder,
        settings,
        critic=critic,
        sampler=sampler,
        progress=lambda done, _: say(len(cut) + done, total),
    ):
        spent.extend(sum(row) for row in shard["kl"])
    kl = torch.tensor(spent, dtype=torch.float64).view(len(directions), len(betas), samples).mean(-1)
    return Calibration(
        list(betas),
        kl.tolist(),
        settings.max_new_tokens,
        settings.top_k,
        settings.temperature,
        floor=sum(cut) / len(cut) if cut else 0.0,
    )
