"""Iterated KL-regularised policy improvement: sample, score, replay, fit, report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mavis.critics.head_critic import HeadCritic
from mavis.distributed import join_processes
from mavis.errors import ConfigError
from mavis.policies import Prompt
from mavis.policies.devices import states_device
from mavis.policies.limits import check_prompts_fit
from mavis.rewards import Objective
from mavis.rollouts.checks import check_objectives, check_prompts
from mavis.rollouts.sampler import GENERATE_SAMPLER, Sampler
from mavis.training.improvement.report import IterationReport
from mavis.training.improvement.settings import ImprovementSettings
from mavis.training.improvement.stages import ImprovementStages
from mavis.training.metrics import Log
from mavis.training.run_folder import Progress
from mavis.utils.files import refuse_model_folder
from mavis.utils.locks import locked_folder


def improve(
    policy: Any,
    tokenizer: Any,
    critic: HeadCritic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: ImprovementSettings,
    *,
    sampler: Sampler = GENERATE_SAMPLER,
    progress: Progress | None = None,
    log: Log | None = None,
) -> Iterator[IterationReport]:
    """Improve a critic iteration by iteration, yielding a report for each; the critic is trained in place.

    In iteration 0 the reference policy samples, and every head learns its own objective's value. In each later
    iteration tilted policies sample, and the heads learn the values of these. `independent` is the paper's iteration,
    in which every objective has its own policy:

        π_m ∝ π_ref exp(β Q_m),   Q_m(s_t, a_t) ← E_{π_m}[R_m − ζ Σ_{t'>t} KL_{t'}]

    `conditioned` is soft policy iteration for all weights and strengths at once, with λ = β·w drawn for each rollout:

        π_λ ∝ π_ref exp(Σ_m λ_m Q_m(·; λ) − K(·; λ)),   Q_m(s_t, a_t; λ) ← E_{π_λ}[R_m],   K ← E_{π_λ}[Σ_{t'>t} KL_{t'}]

    With `reuse`, every rollout of earlier iterations is replayed under a policy of this one, drawn in the same way.

    Everything is written to `folder` as soon as it is finished: the initial critic, rollouts in shards, a critic and a
    report per iteration, and at the end the calibrated critic in `folder/critic`. An interrupted run resumes when the
    same call is made on the same folder. With more `iterations` a run goes on, and ends as if it had been started so.

    Under `accelerate launch` or `torchrun` all processes make the same call. They share the sampling, the replay and
    every batch of the fit, and the result matches a single-process run up to rounding. Only the main process reports
    progress and writes, except for shards of rollouts.

    Args:
        policy: the reference policy; it is not changed.
        tokenizer: its tokenizer.
        critic: the initial critic.
        objectives: by name, in the critic's order.
        prompts: to sample from; each iteration draws them in a fresh order.
        folder: of this run.
        settings: of this run.
        sampler: draws the rollouts, such as `mavis.vllm.sampler.VllmSampler`; by default the policy's `generate`.
        progress: called with stage, done and total as each stage advances.
        log: called with the held-out error after each epoch and with the metrics of each iteration, see `MetricLogger`.

    Yields:
        One report per iteration, including iterations that an earlier call finished.

    Raises:
        ConfigError: if the critic is a group, the objectives or the composition are not the critic's, the processes
            cannot work together, or the longest prompt and response have more positions than the policy has learnt.
        PolicyError: if the tokenizer writes tokens that the policy has no embedding of.
        ProcessError: if the processes run different things, do not share the folder, or one has stopped.
        DataError: if the folder belongs to a run with other settings, or another run is using it.
        CriticError: if the critic is for another shape of policy, or an objective never varies.

    Source: MAVIS, arXiv 2508.13415. The fixed point of `independent` is not the optimum of a mixture; that of
    `conditioned` is.

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.rewards import Brevity
        >>> from mavis.rollouts import RolloutSettings
        >>> from mavis.training import FitSettings, ImprovementSettings, improve
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.HiddenStateCritic.for_policy(policy, ["short"], hidden=8)
        >>> settings = ImprovementSettings(
        ...     iterations=1, rollouts=8, calibration_samples=1,
        ...     sampling=RolloutSettings(max_new_tokens=8), fit=FitSettings(epochs=1),
        ... )
        >>> prompts = ["Once upon a time", "The dog"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for report in improve(policy, tokenizer, critic, {"short": Brevity()}, prompts, folder, settings):
        ...         print(report.iteration, report.rollouts, list(report.explained), len(report.losses))
        0 8 ['short'] 2
        >>> critic.calibration.max_new_tokens
        8
    """
    if not isinstance(critic, HeadCritic):
        raise ConfigError(
            f"critic is a {type(critic).__name__}, expected one critic with heads of its own.",
            "train each critic in a run of its own, or build one for all objectives.",
        )
    if settings.composition != critic.composition:
        raise ConfigError(
            f"composition is {settings.composition!r}, but the critic is {critic.composition!r}.",
            f"build the critic with composition={settings.composition!r}, or choose the other.",
        )
    check_objectives(critic, objectives)
    check_prompts(prompts)
    check_prompts_fit(policy, tokenizer, prompts, settings.sampling.max_new_tokens, critic.max_positions)
    refuse_model_folder(Path(folder))
    with locked_folder(Path(folder), join_processes(states_device(policy)).is_main):
        stages = ImprovementStages.start(
            policy,
            tokenizer,
            critic,
            objectives,
            prompts,
            Path(folder),
            settings,
            sampler=sampler,
            progress=progress,
            log=log,
        )
        previous = None
        for iteration in range(settings.iterations):
            report = stages.load_finished(iteration)
            if report is None:
                shards = stages.sample(iteration)
                if iteration == 0:
                    stages.set_scale(shards)
                replayed = stages.replay(iteration, shards)
                fitted = stages.fit(iteration, replayed)
                report = stages.save(iteration, replayed, fitted)
            stages.warn(report, previous)
            previous = report
            stages.logger.log_groups(report.metrics(), iteration)
            yield report
        stages.calibrate()
