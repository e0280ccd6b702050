"""A sweep over weights and β on prompts that were not trained on, and what it shows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mavis.critics.head_critic import HeadCritic
from mavis.decoding import MavisTilt
from mavis.distributed import join_processes
from mavis.errors import ConfigError, DataError, EvaluationError
from mavis.evaluation.pareto import hypervolume, non_dominated
from mavis.evaluation.speed import compare_speed
from mavis.evaluation.sweep_row import RowMaker
from mavis.evaluation.value_calibration import value_calibration
from mavis.math.best_of_n import best_of_n
from mavis.math.frontier import frontier_efficiency, optimal_frontier, optimal_reward_at, reward_at
from mavis.math.simplex import simplex_grid
from mavis.policies.devices import states_device
from mavis.rewards import Objective
from mavis.rollouts.collect import RolloutPlan, collect
from mavis.rollouts.sampling import RolloutSettings

LIMIT_BETAS = torch.logspace(-2, 2, 81, dtype=torch.float64)
"""Where the optimal frontier is drawn; 0 is put before it."""

BEST_OF = (2, 4, 8, 16)
"""For how many responses best-of-n is told beside it; n times the forward passes of one."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is swept and how well.

    Args:
        divisions: d ≥ 1 of the simplex grid of weights; 4 gives five points for two objectives.
        betas: tilt strengths, > 0, in 1 / reward.
        samples: responses per prompt, weights and β, ≥ 1.
        reference_samples: N ≥ 2 reference rollouts per prompt, which the optimal frontier is computed from.
        target_kls: where the frontier efficiency is read, nats per sequence, > 0.
        speed_batch: rows of the speed measurement, ≥ 1.
        speed_repeats: rounds of the speed measurement; 0 leaves it out.
        sampling: of the responses.

    Raises:
        ConfigError: if a number is out of range.
    """

    divisions: int = 4
    betas: Sequence[float] = (1.0, 2.0, 3.0, 4.0)
    samples: int = 32
    reference_samples: int = 1024
    target_kls: Sequence[float] = (1.0, 2.0)
    speed_batch: int = 8
    speed_repeats: int = 5
    sampling: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta < math.inf for beta in self.betas):
            raise ConfigError(f"betas is {list(self.betas)}, expected numbers > 0.", "β = 0 is always measured.")
        if not all(0 < kl < math.inf for kl in self.target_kls):
            raise ConfigError(f"target_kls is {list(self.target_kls)}, expected numbers > 0.", "1 and 2 are common.")
        if self.samples < 1 or self.reference_samples < 2:
            raise ConfigError(
                f"samples is {self.samples} and reference_samples {self.reference_samples}; expected ≥ 1 and ≥ 2.",
                "32 and 1024 are good numbers.",
            )
        if self.speed_repeats > 0 and self.speed_batch < 1:
            raise ConfigError(f"speed_batch is {self.speed_batch}, expected ≥ 1.", "speed_repeats=0 leaves it out.")


def evaluate(
    policy: Any,
    tokenizer: Any,
    critic: HeadCritic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
    *,
    held_out: Mapping[str, Objective] | None = None,
    reference: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure what a critic's tilt earns, what it costs, and how far it is from the best that is possible.

    Several processes share out the sampling, which is most of the work; the main one alone does the rest.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: to be evaluated; attached as it is needed and detached at the end. If it is saved or uploaded after
            this, its card tells the efficiency.
        objectives: by name, in the critic's order.
        prompts: P prompts that the critic was not trained on.
        folder: where the rollouts go; a repeated call goes on where it stopped.
        settings: how.
        held_out: objectives that nobody optimised, to see whether the tilt over-optimises.
        reference: the folder of `reference_rollouts` that several evaluations share; None is `folder`.
        progress: told how far each stage is.

    Returns:
        Plain data: `rows`, one per weights and β (β = 0 first, the reference policy), with rewards on the normalised
        scale and their standard errors, KL, the frontier efficiency at the row's own KL, length in tokens,
        distinct-2, perplexity under the reference policy, held-out objectives and tokens per second; `efficiency` at
        the target KLs by weights; `cut`, the row of the reference policy cut to the tilt's candidates, None if they are
        all tokens; `limits`, the optimal frontier and best-of-n by weights; `front`; `values`, the calibration of the
        heads; `speed`. Nothing in processes other than the main one.

    Raises:
        ConfigError: if a setting is out of range or the objectives are not the critic's.
        DataError: if there is no prompt, or the folder holds rollouts of another evaluation.
    """
    _check(prompts, critic, objectives)
    settings.sampling.check(policy)
    processes = join_processes(states_device(policy))
    say = (progress if processes.is_main else None) or (lambda stage, done, total: None)
    place = Path(folder)
    grid = simplex_grid(len(objectives), settings.divisions)

    plain = _gather(
        reference_rollouts(
            policy,
            tokenizer,
            objectives,
            prompts,
            reference or place,
            settings,
            progress=partial(say, "reference rollouts"),
        )
    )
    plan = _sweep_plan(prompts, grid, settings)
    sweep = _gather(
        collect(
            policy,
            tokenizer,
            objectives,
            plan,
            place / "sweep",
            _sweep_sampling(settings),
            critic=critic,
            progress=partial(say, "sweep"),
        )
    )
    cut = _gather(untilted_rollouts(policy, tokenizer, objectives, prompts, place, settings))
    if not processes.is_main:
        return {}
    speed = _speed(policy, tokenizer, critic, prompts, settings)
    scored = RowMaker(
        policy,
        critic,
        dict(held_out or {}),
        prompts=len(prompts),
        samples=settings.samples,
        temperature=settings.sampling.temperature,
    )
    normalised = critic.normalise(torch.tensor(plain["rewards"], dtype=torch.float64))
    per_prompt = normalised.view(len(prompts), settings.reference_samples, -1)

    points = [(weights, beta) for weights in grid for beta in settings.betas]
    say("scoring", 0, len(points))
    rows = [scored.row(plain, slice(None), None, 0.0, speed)]
    floor = scored.row(cut, slice(None), None, 0.0, {}) if cut else None
    size = len(prompts) * settings.samples
    for index, (weights, beta) in enumerate(points):
        rows.append(scored.row(sweep, slice(index * size, (index + 1) * size), weights, beta, speed))
        rows[-1]["efficiency"] = efficiency_at(
            per_prompt @ weights, _weighted(rows[-1], weights, critic), rows[-1]["kl"]
        )
        say("scoring", index + 1, len(points))
    efficiency = _efficiencies(rows, floor or rows[0], per_prompt, grid, critic, settings)
    critic.about["efficiency"] = [{name: one[name] for name in ("weights", "kl", "efficiency")} for one in efficiency]
    return {
        "objectives": list(critic.objectives),
        "prompts": list(prompts),
        "settings": asdict(settings) | {"betas": list(settings.betas), "target_kls": list(settings.target_kls)},
        "normalisation": {
            name: {"mean": float(mean), "std": float(std)}
            for name, mean, std in zip(critic.objectives, critic.reward_mean, critic.reward_std, strict=True)
        },
        "rows": rows,
        "cut": floor,
        "efficiency": efficiency,
        "limits": _limits(per_prompt, grid, critic),
        "front": _front(rows, critic),
        "values": value_calibration(policy, critic, plain, sweep, settings.sampling),
        "speed": speed,
    }


def reference_rollouts(
    policy: Any,
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Any]:
    """Sample what the optimal frontier is computed from; it needs no critic, so it can be done before there is one.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: by name, in the critic's order.
        prompts: the evaluation prompts.
        folder: the one that `evaluate` will be given, as `folder` or as `reference`; it takes the rollouts from there.
        settings: the same as for `evaluate`.
        progress: see `collect`.

    Yields:
        Shards, see `collect`.
    """
    repeated = [prompt for prompt in prompts for _ in range(settings.reference_samples)]
    plan = RolloutPlan.reference(repeated, len(objectives))
    sampling = replace(settings.sampling, top_k=None)  # the limit is that of the whole policy
    yield from collect(policy, tokenizer, objectives, plan, Path(folder) / "reference", sampling, progress=progress)


def untilted_rollouts(
    policy: Any,
    tokenizer: Any,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
) -> Iterator[Any]:
    """Sample the reference policy cut to the tilt's candidates, where every sweep begins; nothing if it is uncut.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: by name, in the critic's order.
        prompts: the evaluation prompts.
        folder: the one that `evaluate` will be given; it takes the rollouts from there.
        settings: the same as for `evaluate`.

    Yields:
        Shards, see `collect`.
    """
    if settings.sampling.top_k is None:
        return
    plan = RolloutPlan.reference([prompt for prompt in prompts for _ in range(settings.samples)], len(objectives))
    sampling = _sweep_sampling(settings)
    yield from collect(policy, tokenizer, objectives, plan, Path(folder) / "cut", sampling, truncate_reference=True)


def _sweep_sampling(settings: EvaluationSettings) -> RolloutSettings:
    return replace(settings.sampling, seed=settings.sampling.seed + 1)


def _sweep_plan(prompts: Sequence[str], grid: Tensor, settings: EvaluationSettings) -> RolloutPlan:
    rows = [
        (prompt, weights, beta)
        for weights in grid
        for beta in settings.betas
        for prompt in prompts
        for _ in range(settings.samples)
    ]
    return RolloutPlan(
        prompts=[prompt for prompt, _, _ in rows],
        weights=torch.stack([weights for _, weights, _ in rows]),
        betas=torch.tensor([beta for _, _, beta in rows], dtype=torch.float64),
    )


def _gather(shards: Iterator[Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for shard in shards:
        for name, values in shard[:].items():
            columns.setdefault(name, []).extend(values)
    return columns


def _weighted(row: dict[str, Any], weights: Tensor, critic: HeadCritic) -> float:
    return float(sum(w * row["rewards"][name] for w, name in zip(weights.tolist(), critic.objectives, strict=True)))


def efficiency_at(rewards: Tensor, ours: float | None, kl: float) -> float | None:
    """Compute the frontier efficiency at one KL.

    Args:
        rewards: (P, N) rewards w·R of reference rollouts.
        ours: the reward that is reached at this KL, or None.
        kl: in nats per response.

    Returns:
        The efficiency; None where nothing is reached or the limit cannot be trusted.
    """
    if ours is None:
        return None
    try:
        return frontier_efficiency(ours, float(rewards.mean()), optimal_reward_at(rewards, kl))
    except EvaluationError:
        return None


def _efficiencies(
    rows: list[dict[str, Any]],
    untilted: dict[str, Any],
    per_prompt: Tensor,
    grid: Tensor,
    critic: HeadCritic,
    settings: EvaluationSettings,
) -> list[dict[str, Any]]:
    """Read each weight's sweep over β at the target KLs; it begins with the policy that is not tilted, only cut."""
    found = []
    per_weight = len(settings.betas)
    for index, weights in enumerate(grid):
        sweep = [untilted, *rows[1 + index * per_weight : 1 + (index + 1) * per_weight]]
        rewards = per_prompt @ weights
        kl = torch.tensor([row["kl"] for row in sweep], dtype=torch.float64)
        ours = torch.tensor([_weighted(row, weights, critic) for row in sweep], dtype=torch.float64)
        for target in settings.target_kls:
            reached = reward_at(kl, ours, target)
            found.append(
                {
                    "weights": dict(zip(critic.objectives, weights.tolist(), strict=True)),
                    "kl": float(target),
                    "reward": reached,
                    "efficiency": efficiency_at(rewards, reached, target),
                }
            )
    return found


def _limits(per_prompt: Tensor, grid: Tensor, critic: HeadCritic) -> list[dict[str, Any]]:
    limits = []
    for weights in grid:
        frontier = optimal_frontier(per_prompt @ weights, torch.cat([torch.zeros(1, dtype=torch.float64), LIMIT_BETAS]))
        limits.append(
            {
                "weights": dict(zip(critic.objectives, weights.tolist(), strict=True)),
                "kl": frontier.kl.tolist(),
                "reward": frontier.reward.tolist(),
                "effective_sample_size": frontier.effective_sample_size.tolist(),
                "best_of_n": [
                    dict(zip(("n", "reward", "kl"), (n, *best_of_n(per_prompt @ weights, n)), strict=True))
                    for n in BEST_OF
                    if n <= per_prompt.shape[1]
                ],
            }
        )
    return limits


def _front(rows: list[dict[str, Any]], critic: HeadCritic) -> dict[str, Any]:
    """The non-dominated rows and their volume above one standard deviation below the reference policy's mean."""
    rewards = np.array([[row["rewards"][name] for name in critic.objectives] for row in rows])
    reference_point = [-1.0] * len(critic.objectives)
    return {
        "reference_point": dict(zip(critic.objectives, reference_point, strict=True)),
        "hypervolume": hypervolume(rewards, reference_point),
        "non_dominated": [bool(flag) for flag in non_dominated(rewards)],
    }


def _speed(
    policy: Any,
    tokenizer: Any,
    critic: HeadCritic,
    prompts: Sequence[str],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    if settings.speed_repeats < 1:
        return {}
    texts = [prompts[i % len(prompts)] for i in range(settings.speed_batch)]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    device = states_device(policy)
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    equal = [1 / len(critic.objectives)] * len(critic.objectives)
    # Its hooks are no part of plain decoding's cost; but a critic that the caller attached stays attached.
    ours = critic.attached_policy is None

    def plain() -> None:
        if ours:
            critic.detach()

    def tilted() -> MavisTilt:
        if ours:
            critic.detach()
            critic.attach(policy)
        return MavisTilt(equal, critic, beta=1.0, top_k=settings.sampling.top_k)

    try:
        speeds = compare_speed(
            policy,
            inputs,
            {"plain": plain, "tilted": tilted},
            new_tokens=settings.sampling.max_new_tokens,
            repeats=settings.speed_repeats,
        )
    finally:
        plain()
    return {**speeds, "batch": settings.speed_batch}


def _check(
    prompts: Sequence[str],
    critic: HeadCritic,
    objectives: Mapping[str, Objective],
) -> None:
    if tuple(objectives) != critic.objectives:
        raise ConfigError(
            f"objectives are {', '.join(objectives)}, but the critic has: {', '.join(critic.objectives)}.",
            "pass the same names in the same order.",
        )
    if not prompts:
        raise DataError("prompts is empty.", "give at least one prompt that was not trained on.")
