"""Candidate pairs to ask a user about, sampled under different weights."""

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
from mavis.critics.group import as_critic
from mavis.decoding.weights import lambda_rows
from mavis.errors import PreferenceError
from mavis.math.simplex import simplex_grid
from mavis.policies.chat import Prompt, prompt_key
from mavis.preference.pairs import Pair, critic_objectives
from mavis.rewards import Objective
from mavis.rollouts import RolloutPlan, RolloutSettings, collect


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs that a user can be asked about.

    Attributes:
        pairs: P pairs; nobody has chosen yet, so `chosen` is merely the first response.
        differences: (P, M) float64, R(chosen) − R(rejected) in normalised rewards.

    Examples:
        >>> import torch
        >>> from mavis.preference import CandidatePairs, Pair
        >>> pool = CandidatePairs((Pair("Once", " upon a time.", " more."),), torch.tensor([[0.5, -1.0]]))
        >>> len(pool.pairs), pool.differences.shape
        (1, torch.Size([1, 2]))
    """

    pairs: tuple[Pair, ...]
    differences: Tensor


def candidate_pairs(
    policy: Any,
    tokenizer: Any,
    critic: Critic | Sequence[Critic],
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: RolloutSettings,
    *,
    beta: float | None = None,
    target_kl: float | None = None,
    divisions: int = 2,
) -> CandidatePairs:
    """Sample responses to each prompt under different weights, and pair those of the same prompt.

    Responses of the reference policy often have similar rewards. Tilted ones differ, and they are what the user will
    see later. So each prompt gets one untilted response and one per point of a grid of weights. Interrupted runs resume
    when rerun.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: tilts, and normalises the rewards; or several under one tilt.
        objectives: the critic's M objectives by name, in any order.
        prompts: to respond to; duplicates are dropped.
        folder: where the responses are stored; a repeated call reads them from there.
        settings: how to sample.
        beta: strength of the tilt in 1 / reward; None takes `target_kl`, or the critic's calibrated default.
        target_kl: distance to the reference in nats per response of up to `settings.max_new_tokens`, instead of beta.
        divisions: d ≥ 1 of the simplex grid of weights; 2 gives each objective alone and every two in equal parts.

    Returns:
        All pairs of distinct responses whose rewards differ, each once; the order within a pair is random.

    Raises:
        PreferenceError: if no two responses to a prompt differ in their rewards.
        ConfigError, CriticError, DataError, DecodingError, ObjectiveError, WeightsError: see
            `mavis.rollouts.collect`, `mavis.MavisTilt` and `mavis.math.simplex.simplex_grid`.

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.preference import candidate_pairs
        >>> from mavis.rewards import Dialogue, Positive
        >>> from mavis.rollouts import RolloutSettings
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> objectives = {"positive": Positive(), "dialogue": Dialogue()}
        >>> settings = RolloutSettings(max_new_tokens=24)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pool = candidate_pairs(policy, tokenizer, critic, objectives, ["The dog"], folder, settings, beta=4.0)
        >>> pool.pairs[0].prompt, len(pool.pairs) == len(pool.differences)
        ('The dog', True)
    """
    critic = as_critic(critic)
    names = critic.objectives
    grid = torch.cat([torch.zeros(1, len(names), dtype=torch.float64), simplex_grid(len(names), divisions)])
    lam = lambda_rows(grid, critic, beta, target_kl, settings.max_new_tokens)
    distinct = list({prompt_key(prompt): prompt for prompt in prompts}.values())
    rows = [prompt for prompt in distinct for _ in lam]
    plan = RolloutPlan(rows, lam.repeat(len(distinct), 1), torch.ones(len(rows), dtype=torch.float64))
    ordered = critic_objectives(critic, objectives)
    responses: list[str] = []
    raw: list[list[float]] = []
    for shard in collect(policy, tokenizer, ordered, plan, folder, settings, critic=critic):
        responses += shard["response"]
        raw += shard["rewards"]
    rewards = critic.normalise(torch.tensor(raw, dtype=torch.float64).reshape(-1, len(names)))
    # Responses come in the order of the weights, which the order within a pair must not reveal.
    generator = random.Random(settings.seed)
    pairs, differences, seen = [], [], set[tuple[str, frozenset[str]]]()
    for start in range(0, len(rows), len(lam)):
        for pair in combinations(range(start, start + len(lam)), 2):
            first, second = generator.sample(pair, 2)
            difference = rewards[first] - rewards[second]
            texts = frozenset({responses[first].strip(), responses[second].strip()})
            # Different weights may yield the same two responses, which should not be asked about twice.
            if len(texts) == 2 and bool(difference.any()) and (prompt_key(rows[first]), texts) not in seen:
                seen.add((prompt_key(rows[first]), texts))
                pairs.append(Pair(rows[first], responses[first], responses[second]))
                differences.append(difference)
    if not pairs:
        raise PreferenceError(
            f"no two responses to any of the {len(distinct)} prompts differ in their rewards.",
            "use more prompts, longer responses or a stronger tilt.",
        )
    return CandidatePairs(tuple(pairs), torch.stack(differences))
