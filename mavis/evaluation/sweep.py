"""Evaluation of a critic: a sweep over weights and β on held-out prompts, measured against the optimal frontier."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from mavis.critics import Critic
from mavis.critics.group import as_critic, value_critics
from mavis.decoding.weights import weight_rows
from mavis.distributed import join_processes
from mavis.errors import DataError, WeightsError
from mavis.evaluation.efficiency import efficiency_at, reward_limits, target_efficiencies
from mavis.evaluation.pareto import pareto_front
from mavis.evaluation.report import EvaluationReport
from mavis.evaluation.settings import EvaluationSettings
from mavis.evaluation.speed import measure_speed
from mavis.evaluation.sweep_rollouts import gather_columns, reference_rollouts, tilted_rollouts, truncated_rollouts
from mavis.evaluation.sweep_row import RowBuilder
from mavis.evaluation.value_calibration import value_calibration
from mavis.math.simplex import simplex_grid
from mavis.policies import Prompt
from mavis.policies.devices import states_device
from mavis.policies.limits import check_prompts_fit
from mavis.rewards import Objective
from mavis.rollouts.checks import check_objectives


def evaluate(
    policy: Any,
    tokenizer: Any,
    critic: Critic | Sequence[Critic],
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: EvaluationSettings,
    *,
    held_out: Mapping[str, Objective] | None = None,
    reference: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> EvaluationReport | None:
    """Measure what a critic's tilt earns, what it costs, and how close it comes to the best that is possible.

    Several processes share the sampling, which is most of the work; the main process does the rest. Interrupted runs
    resume when rerun.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: to evaluate, or several under one tilt; attached as needed and detached at the end. When a single one is
            saved or uploaded afterwards, its model card reports the efficiency.
        objectives: by name, in the critic's order.
        prompts: P prompts that the critic was not trained on.
        folder: where the rollouts are written.
        settings: what is swept and how much is sampled.
        held_out: objectives that were not optimised, to see whether the tilt over-optimises.
        reference: the folder of `reference_rollouts` that several evaluations share; None is `folder`.
        progress: called with the stage, the number of units done and their total.

    Returns:
        The report; None in processes other than the main one.

    Raises:
        WeightsError: if the weights to sweep do not fit the objectives.
        ConfigError: if a setting is out of range, the objectives are not the critic's, or the longest prompt and
            response have more positions than the policy or a value model has learnt.
        CriticError: if several critics cannot be grouped, or one has no value heads.
        PolicyError: if the tokenizer writes tokens that the policy has no embedding of.
        DataError: if there is no prompt, or the folder holds rollouts of another evaluation.

    Examples:
        A real evaluation takes the default settings; this one is cut short:

        >>> import tempfile
        >>> import mavis
        >>> from mavis.evaluation import EvaluationSettings
        >>> from mavis.rewards import Dialogue, Positive
        >>> from mavis.rollouts import RolloutSettings
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> objectives = {"positive": Positive(), "dialogue": Dialogue()}
        >>> sampling = RolloutSettings(max_new_tokens=8, top_k=None)
        >>> settings = EvaluationSettings(1, (1.0,), samples=2, reference_samples=4, speed_repeats=0, sampling=sampling)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = mavis.evaluate(policy, tokenizer, critic, objectives, ["The dog"], folder, settings)
        >>> [(row.weights, row.beta) for row in report.rows[1:]]
        [({'positive': 1.0, 'dialogue': 0.0}, 1.0), ({'positive': 0.0, 'dialogue': 1.0}, 1.0)]
        >>> report.rows[0].kl, all(row.kl > 0 for row in report.rows[1:])
        (0.0, True)
    """
    critic = as_critic(critic)
    value_critics(critic)  # refuses now what has no values to compare with returns
    check_objectives(critic, objectives)
    if not prompts:
        raise DataError("prompts is empty.", "give at least one prompt that was not trained on.")
    critic.fingerprint.check(policy)
    settings.sampling.check(policy)
    check_prompts_fit(policy, tokenizer, prompts, settings.sampling.max_new_tokens, critic.max_positions)
    processes = join_processes(states_device(policy))
    report_progress = (progress if processes.is_main else None) or (lambda stage, done, total: None)
    if settings.weights is None:
        grid = simplex_grid(len(objectives), settings.divisions)
    else:
        grid = weight_rows(settings.weights, list(objectives))
        if not bool(grid.any(1).all()):
            raise WeightsError(
                f"weights is {settings.weights!r}, where a choice weighs nothing.",
                "the plain policy is always measured.",
            )
    common = (objectives, prompts)

    plain = gather_columns(
        reference_rollouts(
            policy,
            tokenizer,
            *common,
            reference or folder,
            settings,
            progress=partial(report_progress, "reference rollouts"),
        )
    )
    tilted = gather_columns(
        tilted_rollouts(
            policy,
            tokenizer,
            critic,
            *common,
            grid,
            folder,
            settings,
            progress=partial(report_progress, "sweep"),
        )
    )
    truncated = gather_columns(truncated_rollouts(policy, tokenizer, *common, folder, settings))
    if not processes.is_main:
        return None

    speed = measure_speed(policy, tokenizer, critic, prompts, settings)
    builder = RowBuilder(
        policy,
        critic,
        held_out or {},
        prompts=len(prompts),
        samples=settings.samples,
        temperature=settings.sampling.temperature,
        min_new_tokens=settings.sampling.min_new_tokens,
    )
    rewards = critic.normalise(torch.tensor(plain["rewards"], dtype=torch.float64))
    rewards = rewards.view(len(prompts), settings.reference_samples, -1)
    points = [(weights, beta) for weights in grid for beta in settings.betas]
    report_progress("scoring", 0, len(points))
    rows = [builder.build(plain, speed=speed)]
    cut = builder.build(truncated) if truncated else None
    size = len(prompts) * settings.samples
    for index, (weights, beta) in enumerate(points):
        row = builder.build(tilted, slice(index * size, (index + 1) * size), weights, beta, speed)
        efficiency = efficiency_at(rewards @ weights, row.weighted_reward(weights.tolist()), row.kl)
        rows.append(replace(row, efficiency=efficiency))
        report_progress("scoring", index + 1, len(points))

    # Each sweep over β begins with the policy that is truncated but not tilted.
    starts = range(1, len(rows), len(settings.betas))
    sweeps = [[cut or rows[0], *rows[start : start + len(settings.betas)]] for start in starts]
    efficiencies = target_efficiencies(sweeps, rewards, grid, critic.objectives, settings.target_kls)
    critic.about["efficiency"] = [{"weights": e.weights, "kl": e.kl, "efficiency": e.efficiency} for e in efficiencies]
    return EvaluationReport(
        objectives=list(critic.objectives),
        prompts=list(prompts),
        settings=asdict(settings)
        | {"betas": list(settings.betas), "target_kls": list(settings.target_kls)}
        | {"weights": None if settings.weights is None else grid.tolist()},
        normalisation={
            name: {"mean": float(mean), "std": float(std)}
            for name, mean, std in zip(critic.objectives, critic.reward_mean, critic.reward_std, strict=True)
        },
        rows=rows,
        cut=cut,
        efficiency=efficiencies,
        limits=reward_limits(rewards, grid, critic.objectives),
        front=pareto_front([row.rewards for row in rows]),
        values=value_calibration(policy, critic, plain, tilted, settings.sampling),
        speed=speed,
    )
