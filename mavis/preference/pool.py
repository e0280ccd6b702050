"""Responses that differ, to ask a user about: sampled under different weights."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic
from mavis.decoding.weights import lambda_rows
from mavis.errors import PreferenceError
from mavis.math.simplex import simplex_grid
from mavis.preference.pairs import Pair, in_order_of
from mavis.rewards import Objective
from mavis.rollouts import RolloutPlan, RolloutSettings, collect


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs that a user can be asked about.

    Args:
        pairs: P pairs; nobody has chosen yet, so `chosen` is the first of the two only.
        differences: (P, M) float64, R(chosen) − R(rejected) in normalised rewards.
    """

    pairs: tuple[Pair, ...]
    differences: Tensor


def candidate_pairs(
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: RolloutSettings,
    *,
    beta: float | None = None,
    target_kl: float | None = None,
    divisions: int = 2,
) -> CandidatePairs:
    """Sample responses to each prompt under different weights, and pair those of the same prompt.

    Plain responses are much alike in what the objectives see. Tilted ones differ, and they are what the user will be
    given later: so for each prompt one is plain and one is tilted by each point of a grid of weights.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: tilts, and normalises the rewards.
        objectives: the critic's M objectives by name, in any order.
        prompts: what the responses go on from; one that comes twice counts once.
        folder: where the responses go; the same call on the same folder samples nothing again.
        settings: how to sample.
        beta: strength of the tilt in 1 / reward; None takes `target_kl`, or the critic's calibrated default.
        target_kl: distance to the reference in nats per response, instead of beta.
        divisions: steps of the grid from one objective to the next, ≥ 1; 2 gives each objective alone and every two
            in equal parts.

    Returns:
        All pairs of different responses whose rewards differ, each once, in an order that tells nothing of the weights.

    Raises:
        PreferenceError: if no two responses to a prompt differ in their rewards.
        ConfigError, CriticError, DataError, DecodingError, ObjectiveError, WeightsError: see
            `mavis.rollouts.collect`, `mavis.MavisTilt` and `mavis.math.simplex.simplex_grid`.
    """
    names = critic.objectives
    grid = torch.cat([torch.zeros(1, len(names), dtype=torch.float64), simplex_grid(len(names), divisions)])
    lam = lambda_rows(grid, critic, beta, target_kl)
    different = list(dict.fromkeys(prompts))
    rows = [prompt for prompt in different for _ in lam]
    plan = RolloutPlan(rows, lam.repeat(len(different), 1), torch.ones(len(rows), dtype=torch.float64))
    scored = in_order_of(critic, objectives)
    responses: list[str] = []
    raw: list[list[float]] = []
    for shard in collect(policy, tokenizer, scored, plan, folder, settings, critic=critic):
        responses += shard["response"]
        raw += shard["rewards"]
    rewards = critic.normalise(torch.tensor(raw, dtype=torch.float64).reshape(-1, len(names)))
    # Responses come in the order of the weights, which the order within a pair must not tell.
    toss = random.Random(settings.seed)
    pairs, differences, taken = [], [], set[tuple[str, frozenset[str]]]()
    for start in range(0, len(rows), len(lam)):
        for couple in combinations(range(start, start + len(lam)), 2):
            first, second = toss.sample(couple, 2)
            difference = rewards[first] - rewards[second]
            texts = frozenset({responses[first].strip(), responses[second].strip()})
            # Several weights may have given the same two responses, about which nobody wants to be asked twice.
            if len(texts) == 2 and bool(difference.any()) and (rows[first], texts) not in taken:
                taken.add((rows[first], texts))
                pairs.append(Pair(rows[first], responses[first], responses[second]))
                differences.append(difference)
    if not pairs:
        raise PreferenceError(
            f"no two responses to any of the {len(different)} prompts differ in their rewards.",
            "give more prompts, longer responses or a stronger tilt.",
        )
    return CandidatePairs(tuple(pairs), torch.stack(differences))
