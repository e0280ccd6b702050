"""Distillation: one student critic learns the values that several teachers give to the candidates."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mavis.critics import Critic
from mavis.critics.group import as_critic
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup, join_processes
from mavis.errors import ConfigError
from mavis.policies import Prompt
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.limits import check_prompts_fit
from mavis.policies.token_embeddings import token_embeddings
from mavis.rollouts import RolloutPlan, draw_prompts
from mavis.rollouts.checks import check_prompts
from mavis.rollouts.collect import critic_digest
from mavis.rollouts.replay import ROWS_PER_PASS, forward_sequences
from mavis.training.distillation.imitation import Imitation, explained
from mavis.training.distillation.recordings import Recordings, record, scale
from mavis.training.distillation.settings import DistillReport, DistillSettings
from mavis.training.metrics import Log, MetricLogger, record_training
from mavis.training.regression import draw_held_out, fit_regression
from mavis.training.rollout_tensors import ShardedRollouts, concatenate_rollouts, shard_indices
from mavis.training.run_folder import Progress, load_finished, open_run, report_reuse, save_finished
from mavis.utils.files import refuse_model_folder
from mavis.utils.locks import locked_folder


def distill(
    student: HeadCritic,
    teachers: Critic | Sequence[Critic],
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    settings: DistillSettings,
    *,
    progress: Progress | None = None,
    log: Log | None = None,
) -> DistillReport:
    """Fit one critic to the values that others give to the candidates along the reference policy's responses, in place.

        min Σ_t Σ_m ((E_a δ_m)² + 20 · Var_a δ_m) / scale_m²,     δ_m = Q_m(s_t, a) − Q_m^teacher(s_t, a)

    where a is drawn from π_ref at the sampling temperature, normalised over the candidates, and scale is the standard
    deviation of the teachers' values. Only differences between candidates move a tilt, so they weigh more than what
    the candidates of a step have in common. The student takes over the teachers' normalisation, so that β and weights
    mean the same. Its calibration is removed: how much KL the student spends has not been measured.

    Everything is written to `folder` as soon as it is finished: the initial student, the teachers' values in shards,
    and at the end the student in `folder/critic` with its report. An interrupted run resumes when the same call is
    made on the same folder. Several processes share the work as in `improve`.

    Args:
        student: the initial critic and the result; of the `independent` composition, with the teachers' objectives in
            their order.
        teachers: one critic of any kind, or several whose objectives are concatenated; they are not changed.
        policy: the reference policy; it is not changed.
        tokenizer: its tokenizer.
        prompts: to sample from, in a fresh order.
        folder: of this run.
        settings: of this run.
        progress: called with stage, done and total as each stage advances.
        log: called with the held-out error after each epoch and with what the student explains at the end, see
            `MetricLogger`.

    Returns:
        The report.

    Raises:
        ConfigError: if the objectives differ, a critic is conditioned, the student reads every candidate, the policy
            has fewer tokens than `candidates`, or the longest prompt and response have more positions than it or a
            value model has learnt.
        PolicyError: if the tokenizer writes tokens that the policy has no embedding of.
        CriticError: if the teachers cannot be combined, or a critic is for another shape of policy.
        DataError: if there are no prompts, the folder belongs to a run with other settings, or a shard cannot be read.
        TrainingError: if a teacher's values or the student's error are not finite.

    Source: the values of all objectives in one trunk, as in MAVIS (arXiv 2508.13415).

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.rollouts import RolloutSettings
        >>> from mavis.training import DistillSettings, RegressionSettings, distill
        >>> policy, tokenizer = mavis.embedded.load()
        >>> def new_critic(*objectives):
        ...     return mavis.HiddenStateCritic.for_policy(policy, objectives, hidden=8, composition="independent")
        >>> teachers = [new_critic("positive"), new_critic("dialogue")]  # in practice, trained ones
        >>> student = new_critic("positive", "dialogue")
        >>> settings = DistillSettings(
        ...     rollouts=4, sampling=RolloutSettings(max_new_tokens=4), fit=RegressionSettings(epochs=1)
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = distill(student, teachers, policy, tokenizer, ["The dog"], folder, settings)
        >>> list(report.explained), len(report.losses)
        (['positive', 'dialogue'], 2)
    """
    _refuse_conditioned(student, teachers if isinstance(teachers, list | tuple) else [teachers])
    teacher = as_critic(teachers)
    _check(student, teacher)
    check_prompts(prompts)
    settings.check(policy)
    positions = [most for critic in (student, teacher) if (most := critic.max_positions) is not None]
    length = settings.sampling.max_new_tokens
    check_prompts_fit(policy, tokenizer, prompts, length, min(positions, default=None))
    student.fingerprint.check(policy)
    student.fingerprint = Fingerprint.of(policy)
    processes = join_processes(states_device(policy))
    run, report_progress = Path(folder), (progress if processes.is_main else None) or (lambda stage, done, total: None)
    refuse_model_folder(run)
    with locked_folder(run, processes.is_main):
        open_run(run, student, prompts, settings, processes, objectives={}, teachers=critic_digest(teacher))
        record_training(student, policy, prompts, settings)
        logger = MetricLogger(log if processes.is_main else None, settings.fit.epochs)
        student.to(states_device(policy))
        student.calibration = None
        # The student learns the values of the recorded candidates only.
        student.decoding = replace(settings.sampling.trained_decoding(), top_k=settings.candidates)
        report = load_finished(run, student, DistillReport, processes)
        if report is not None:
            if processes.is_main:
                report_reuse(run)
            logger.errors(report.losses)
        else:
            student.reward_mean.copy_(teacher.reward_mean)
            student.reward_std.copy_(teacher.reward_std)
            recordings = _record(
                student,
                teacher,
                policy,
                tokenizer,
                prompts,
                run / "rollouts",
                settings,
                processes,
                lambda done: report_progress("rollouts", min(done, settings.rollouts), settings.rollouts),
            )
            report_progress("fit", 0, settings.fit.epochs)
            report = _fit(student, recordings, token_embeddings(policy), settings, logger.watch(report_progress, "fit"))
            report = save_finished(run, student, report, processes)
        logger.log_groups(report.metrics())
        return report


def _record(
    student: HeadCritic,
    teacher: Critic,
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: DistillSettings,
    processes: ProcessGroup,
    on_rollouts: Callable[[int], None],
) -> ShardedRollouts[Recordings]:
    """Sample reference rollouts, record the teachers' values, and keep this process's share of them."""
    plan = RolloutPlan.reference(draw_prompts(prompts, settings.rollouts, settings.sampling.seed), 0)
    parts: list[Recordings] = []
    total = 0
    for part in record(
        policy,
        tokenizer,
        teacher,
        plan,
        folder,
        settings.sampling,
        settings.candidates,
        processes=processes,
        on_stored=lambda shards: on_rollouts(shards * settings.sampling.shard_size),
    ):
        own = torch.tensor(processes.shard(range(len(part)), before=total))
        total += len(part)
        if len(own):
            part = part.rows(own) if processes.world_size > 1 else part
            parts.append(_with_states(part, policy) if student.reads_states else part)
    local_indices = shard_indices(total, processes)
    return ShardedRollouts(concatenate_rollouts(parts), local_indices, total, processes)


def _fit(
    student: HeadCritic,
    recordings: ShardedRollouts[Recordings],
    embeddings: torch.Tensor,
    settings: DistillSettings,
    on_epoch: Callable[[int, float], None],
) -> DistillReport:
    order = torch.Generator().manual_seed(settings.sampling.seed)
    held_out = draw_held_out(len(recordings), settings.fit.held_out, order)
    imitation = Imitation(student, embeddings, scale(recordings).to(embeddings.device))
    epoch, losses = fit_regression(
        student, imitation, recordings, settings.fit, held_out=held_out, order=order, on_epoch=on_epoch
    )
    student.refresh_token_table(embeddings)
    watched = held_out.nonzero()[:, 0]
    return DistillReport(*explained(imitation, recordings, watched, settings.fit.batch_size), epoch, losses)


def _with_states(part: Recordings, policy: Any) -> Recordings:
    states = [
        forward_sequences(policy, part.rows(index).sequences)[0].cpu()
        for index in torch.arange(len(part)).split(ROWS_PER_PASS)
    ]
    return replace(part, states=torch.cat(states))


def _refuse_conditioned(student: Any, teachers: Sequence[Any]) -> None:
    if isinstance(student, Critic) and student.conditioned:
        raise ConfigError(
            "the student is conditioned, but its teachers' values are the same for all weights and every β.",
            "build it with composition='independent'.",
        )
    for critic in teachers:
        if isinstance(critic, Critic) and critic.conditioned:
            raise ConfigError(
                f"composition is 'conditioned' in the critic of {', '.join(critic.objectives)}, whose values depend on "
                "the weights and on β.",
                "distil critics that were trained with composition='independent' (improvement=independent).",
            )


def _check(student: HeadCritic, teacher: Critic) -> None:
    if not isinstance(student, HeadCritic):
        raise ConfigError(
            f"student is a {type(student).__name__}, expected one critic with heads of its own.",
            "build a HiddenStateCritic or a ValueModelCritic with all objectives.",
        )
    if student.objectives != teacher.objectives:
        raise ConfigError(
            f"the student's objectives are {', '.join(student.objectives)}, but the teachers have: "
            f"{', '.join(teacher.objectives)}.",
            "build the student with the same names in the same order.",
        )
    if student.projection is None:
        raise ConfigError(
            "the student's readout is 'candidates', which would have to read every candidate at every step.",
            "choose the token readout, or a HiddenStateCritic.",
        )
