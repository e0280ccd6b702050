"""Calibration: measuring the KL that each β spends, so that users can ask for a KL budget."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Calibration, Critic
from mavis.critics.calibration import calibration_directions
from mavis.policies import Prompt, prompt_ids
from mavis.rewards import Objective
from mavis.rollouts.collect import RolloutPlan, collect
from mavis.rollouts.sampler import GENERATE_SAMPLER, Sampler
from mavis.rollouts.sampling import RolloutSettings

BETAS = (0.5, 1.0, 2.0, 4.0, 8.0)

LENGTHS = (0.5, 1, 2, 4)
"""The lengths at which KL is measured, as multiples of the trained one."""


def calibrate(
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: RolloutSettings,
    *,
    samples: int,
    betas: Sequence[float] = BETAS,
    sampler: Sampler = GENERATE_SAMPLER,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure the mean KL of the tilted policy over a grid of weights and β.

        kl[d][g] = mean over rollouts of Σ_{t ≤ n} KL(π ‖ π_ref),   λ = betas[g] · direction[d]

    for responses of up to n = `max_new_tokens` tokens, and for those of half, twice and four times as many: rollouts go
    on to the longest, as far as the policy's context allows, and the KL is read off on the way.

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
    lengths = calibrated_lengths(policy, tokenizer, plan.prompts, settings.max_new_tokens, critic.max_positions)
    longest = replace(settings, max_new_tokens=lengths[-1])
    tilted_kl: list[list[float]] = []
    truncation_kl: list[list[float]] = []
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
            longest,
            truncate_reference=True,
            sampler=sampler,
            progress=lambda done, _: report_progress(done, total),
        ):
            truncation_kl.extend(shard["kl"])
    for shard in collect(
        policy,
        tokenizer,
        objectives,
        plan,
        folder,
        longest,
        critic=critic,
        sampler=sampler,
        progress=lambda done, _: report_progress(len(truncation_kl) + done, total),
    ):
        tilted_kl.extend(shard["kl"])
    shape = len(directions), len(betas), samples
    kl = [_kl_of_first(length, tilted_kl).view(shape).mean(-1).tolist() for length in lengths]
    floors = [float(_kl_of_first(length, truncation_kl).mean()) if truncation_kl else 0.0 for length in lengths]
    trained = lengths.index(settings.max_new_tokens)
    return Calibration(
        list(betas),
        kl[trained],
        settings.max_new_tokens,
        settings.top_k,
        settings.temperature,
        floor=floors[trained],
        lengths=lengths,
        kl_at_lengths=kl,
        floor_at_lengths=floors,
    )


def calibrated_lengths(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    critic_positions: int | None = None,
) -> list[int]:
    """Return the lengths at which KL is measured: multiples of the trained one, as far as the context allows.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        prompts: that are sampled from.
        max_new_tokens: the trained length, which is always included.
        critic_positions: how many positions the critic can read; None for any number.

    Returns:
        Ascending numbers of tokens.
    """
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    most = min((size for size in (context, critic_positions) if size), default=math.inf)
    room = most - max(map(len, prompt_ids(tokenizer, prompts))) if most < math.inf else math.inf
    lengths = {max(1, int(max_new_tokens * multiple)) for multiple in LENGTHS}
    return sorted({length for length in lengths if length <= room} | {max_new_tokens})


def _kl_of_first(length: int, kl: Sequence[Sequence[float]]) -> Tensor:
    """Sum the KL of each response's first `length` tokens, (N,) float64."""
    return torch.tensor([math.fsum(steps[:length]) for steps in kl], dtype=torch.float64)
