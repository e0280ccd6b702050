"""Calibration: measuring the KL that each β spends, so that users can ask for a KL budget."""

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
    """Measure the mean KL of the tilted policy over a grid of weights and β.

        kl[d][g] = mean over rollouts of Σ_t KL(π ‖ π_ref),   λ = betas[g] · direction[d]

    With `settings.top_k`, the KL of truncation alone is measured too, from untilted rollouts.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: to be calibrated; it is not changed.
        objectives: by name, in the critic's order.
        prompts: to sample from, in turn.
        folder: receives the rollouts; an interrupted calibration resumes.
        settings: how rollouts are sampled: with the candidates and temperature of decoding.
        samples: rollouts for each pair of direction and β, ≥ 1.
        betas: ascending, > 0; for a conditioned critic they are scaled to end at the largest β of its training.
        sampler: see `collect`.
        progress: called with the numbers of finished and of all rollouts.

    Returns:
        The calibration, to be stored in the critic.

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.rewards import Dialogue, Positive
        >>> from mavis.rollouts import RolloutSettings
        >>> from mavis.training import calibrate
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> objectives = {"positive": Positive(), "dialogue": Dialogue()}
        >>> settings = RolloutSettings(max_new_tokens=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     calibration = calibrate(
        ...         policy, tokenizer, critic, objectives, ["The dog"], folder, settings, samples=1, betas=(1.0, 2.0)
        ...     )
        >>> [round(beta, 2) for beta in calibration.betas], len(calibration.kl)  # 2 β for each of 3 weights
        ([5.33, 10.67], 3)
    """
    max_beta = float(critic.max_trained_lambda)
    if critic.conditioned and max_beta:
        betas = [max_beta * beta / betas[-1] for beta in betas]
    directions = calibration_directions(len(critic.objectives))
    grid = [(d, b, s) for d in range(len(directions)) for b in betas for s in range(samples)]
    plan = RolloutPlan(
        prompts=[prompts[s % len(prompts)] for _, _, s in grid],  # the same at every grid point, so that these compare
        weights=directions[[d for d, _, _ in grid]],
        betas=torch.tensor([b for _, b, _ in grid], dtype=torch.float64),
    )
    tilted_kl: list[float] = []
    truncation_kl: list[float] = []
    untilted = RolloutPlan.reference(plan.prompts[: samples * len(betas)], len(critic.objectives))
    total = len(grid) + (len(untilted.prompts) if settings.top_k is not None else 0)
    report_progress = progress or (lambda done, total: None)
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
            progress=lambda done, _: report_progress(done, total),
        ):
            truncation_kl.extend(sum(row) for row in shard["kl"])
    for shard in collect(
        policy,
        tokenizer,
        objectives,
        plan,
        folder,
        settings,
        critic=critic,
        sampler=sampler,
        progress=lambda done, _: report_progress(len(truncation_kl) + done, total),
    ):
        tilted_kl.extend(sum(row) for row in shard["kl"])
    kl = torch.tensor(tilted_kl, dtype=torch.float64).view(len(directions), len(betas), samples).mean(-1)
    return Calibration(
        list(betas),
        kl.tolist(),
        settings.max_new_tokens,
        settings.top_k,
        settings.temperature,
        floor=sum(truncation_kl) / len(truncation_kl) if truncation_kl else 0.0,
    )
