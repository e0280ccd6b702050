"""The whole pipeline where the optimum is known: sampled responses in, an exactly evaluated policy out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from mavis import HiddenStateCritic
from mavis.exact import World, WorldObjective, WorldPolicy, normalised_gain, policy_iteration, world_tokenizer
from mavis.rollouts import RolloutSettings
from mavis.training import ImprovementSettings, improve
from mavis.training.improvement.fit import FitSettings
from mavis.training.improvement.report import MIXTURES

BETA = 5.0


@pytest.mark.slow
def test_learnt_conditioned_heads_beat_what_exact_independent_values_converge_to(tmp_path: Path) -> None:
    """At equal weights in a conflicting world; the committed study, with more rollouts, comes to 0.97."""
    world = World.random("conflicting", seed=4)
    weights = torch.tensor([0.5, 0.5])
    for tilt in islice(policy_iteration(world, weights, BETA, "independent"), 8):
        converged = normalised_gain(world, tilt, BETA * weights)
    assert converged == pytest.approx(0.73, abs=0.005)

    policy, tokenizer = WorldPolicy.of(world), world_tokenizer(world)
    objectives = {name: WorldObjective(world, m) for m, name in enumerate(("first", "second"))}
    critic = HiddenStateCritic.for_policy(
        policy, list(objectives), hidden=64, rank=world.tokens, composition="conditioned"
    )
    settings = ImprovementSettings(
        composition="conditioned",
        iterations=3,
        rollouts=4_096,
        later_rate=0.5,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=world.steps, top_k=None, shard_size=1_024),
        fit=FitSettings(epochs=6, weight_decay=0.0),
    )
    prompts = [f"t{token}" for token in range(world.tokens)]
    shares, goals = [], []
    for report in improve(policy, tokenizer, critic, objectives, prompts, tmp_path, settings):
        shares.append(normalised_gain(world, policy.tilts(critic, BETA * weights), BETA * weights))
        goals.append((report.goal[MIXTURES], report.goal_error[MIXTURES]))
    assert shares[-1] >= 0.85 > converged
    assert shares[-1] > shares[0]
    for beta, least in ((0.5, 0.95), (1.0, 0.95), (2.0, 0.95), (BETA, 0.88)):  # one critic for every weight and every β
        for first in (1.0, 0.75, 0.5, 0.0):
            lam = beta * torch.tensor([first, 1 - first])
            assert normalised_gain(world, policy.tilts(critic, lam), lam) >= least, lam
    # J of the mixtures, over the λ that were drawn: the reference policy's, then that of each tilt but the last.
    assert goals[0][0] == pytest.approx(0.0, abs=4.5 * goals[0][1])
    assert goals[1][0] > goals[0][0] + 4.5 * (goals[0][1] + goals[1][1])
