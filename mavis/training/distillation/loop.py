"""Distilling critics: one student learns what several teachers say of the candidates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mavis.critics import Critic
from mavis.critics.group import as_critic
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import join_processes
from mavis.errors import ConfigError, DataError, check_whole
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint, embedding_shape, output_embedding
from mavis.policies.token_embeddings import token_embeddings
from mavis.rollouts.collect import RolloutPlan, critic_digest
from mavis.rollouts.prompts import draw_prompts
from mavis.rollouts.replay import ROWS_PER_PASS, forward_sequences
from mavis.rollouts.sampling import RolloutSettings
from mavis.training.distillation.imitation import Imitation, explained
from mavis.training.distillation.recordings import Recordings, record, scale
from mavis.training.metrics import Log, MetricLogger, record_training
from mavis.training.regression import RegressionSettings, draw_held_out, fit_regression
from mavis.training.rollout_tensors import ShardedRollouts, concatenate_rollouts, shard_indices
from mavis.training.run_folder import Progress, load_finished, open_run, save_finished


@dataclass(frozen=True)
class DistillSettings:
    """How critics are distilled.

    Args:
        rollouts: responses of the reference policy, ≥ 4.
        candidates: K, of how many of the policy's likeliest tokens the teachers are asked the values at each step, ≥ 1;
            the responses are sampled from what `sampling` says.
        sampling: of the rollouts.
        fit: of the student.

    Raises:
        ConfigError: if a setting is out of range.
    """

    rollouts: int = 2048
    candidates: int = 40
    sampling: RolloutSettings = field(default_factory=RolloutSettings)
    fit: RegressionSettings = field(default_factory=RegressionSettings)

    def __post_init__(self) -> None:
        hint = "the defaults are 2048 rollouts and 40 candidates."
        check_whole(ConfigError, hint, 4, rollouts=self.rollouts)
        check_whole(ConfigError, hint, candidates=self.candidates)

    def check(self, policy: Any) -> None:
        """Refuse a policy that has fewer tokens than there are to be candidates.

        Raises:
            ConfigError: if `candidates` or the sampling's `top_k` is larger than the vocabulary.
        """
        _, vocabulary = embedding_shape(output_embedding(policy))
        if self.candidates > vocabulary:
            raise ConfigError(
                f"candidates is {self.candidates}, but the policy has {vocabulary} tokens.",
                f"{vocabulary} makes every token a candidate.",
            )
        self.sampling.check(policy)


@dataclass(frozen=True)
class DistillReport:
    """What a distillation came to, on rollouts that the student was not trained on.

    Args:
        explained: per objective, 1 − squared error / variance of the teacher's values over all steps and candidates;
            None where those do not vary.
        between_candidates: the same for the differences between the candidates of one step, which are all that a tilt
            depends on.
        epoch: which epoch is kept, counted from 1; 0 if none was better than the student at the start.
        losses: the held-out error before the first and after each epoch.
    """

    explained: dict[str, float | None]
    between_candidates: dict[str, float | None]
    epoch: int
    losses: list[float]


def distill(
    student: HeadCritic,
    teachers: Critic | Sequence[Critic],
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: DistillSettings,
    *,
    progress: Progress | None = None,
    log: Log | None = None,
) -> DistillReport:
    """Fit one critic to what others say of the candidates along the reference policy's own responses, in place.

        min Σ_t Σ_m ((E_a δ_m)² + 20 · Var_a δ_m) / scale_m²,     δ_m = Q_m(s_t, a) − Q_m^teacher(s_t, a)

    with a drawn from π_ref at the temperature of the sampling, normalised over the candidates, and scale the teachers'
    standard deviation. Only differences between candidates move a tilt, so they weigh more than what these share. The
    teachers' normalisation becomes the student's, so that β and weights mean the same; its calibration is taken away,
    because nothing is known of the KL that it spends.

    Everything is written to `folder` as it is finished: the start, what the teachers said by shard, and at the end the
    student in `folder/critic` with its report. The same call on the same folder goes on where it stopped. Several
    processes share the work out as in `improve`.

    Args:
        student: the start and the result; in the `independent` composition, with the teachers' objectives in their
            order.
        teachers: one critic of any kind or several, whose objectives follow one another; they stay as they are.
        policy: the reference policy; it stays as it is.
        tokenizer: its tokenizer.
        prompts: to sample from, in a fresh order.
        folder: of this run.
        settings: how.
        progress: told how far each stage is.
        log: told the held-out error after each epoch and what the student explains at the end, see `MetricLogger`.

    Returns:
        The report.

    Raises:
        ConfigError: if the objectives differ, a critic is conditioned, the student reads every candidate, or the policy
            has fewer tokens than there are to be candidates.
        CriticError: if the teachers do not go together, or a critic is for another shape of policy.
        DataError: if there are no prompts, the folder belongs to a run with other settings, or a shard cannot be read.
        TrainingError: if a teacher's values or the student's error are not finite.

    Source: the values of all objectives in one trunk, as in MAVIS (arXiv 2508.13415).
    """
    _refuse_conditioned(student, teachers if isinstance(teachers, list | tuple) else [teachers])
    teacher = as_critic(teachers)
    _check(student, teacher, prompts)
    settings.check(policy)
    student.fingerprint.check(policy)
    student.fingerprint = Fingerprint.of(policy)
    processes = join_processes(states_device(policy))
    run, say = Path(folder), (progress if processes.is_main else None) or (lambda stage, done, total: None)
    open_run(run, student, prompts, settings, processes, teachers=critic_digest(teacher))
    record_training(student, policy, prompts, settings)
    curves = MetricLogger(log if processes.is_main else None, settings.fit.epochs)
    student.to(states_device(policy))
    student.calibration = None
    student.decoding = settings.sampling.trained_decoding()
    if (found := load_finished(run, student, processes)) is not None:
        report = DistillReport(**found)
        curves.errors(report.losses)
        curves.log_groups(_groups(report))
        return report
    student.reward_mean.copy_(teacher.reward_mean)
    student.reward_std.copy_(teacher.reward_std)
    seed, embeddings = settings.sampling.seed, token_embeddings(policy)
    plan = RolloutPlan.reference(draw_prompts(prompts, settings.rollouts, seed), 0)
    parts: list[Recordings] = []
    total = 0
    for part in record(
        policy,
        tokenizer,
        teacher,
        plan,
        run / "rollouts",
        settings.sampling,
        settings.candidates,
        processes=processes,
        tell=lambda done: say(
            "rollouts", min(done * settings.sampling.shard_size, settings.rollouts), settings.rollouts
        ),
    ):
        own = torch.tensor(processes.shard(range(len(part)), before=total))
        total += len(part)
        if len(own):
            part = part.rows(own) if processes.world_size > 1 else part
            parts.append(_with_states(part, policy) if student.reads_states else part)
    local_indices = shard_indices(total, processes)
    recordings = ShardedRollouts(concatenate_rollouts(parts), local_indices, total, processes)
    del parts
    order = torch.Generator().manual_seed(seed)
    held_out = draw_held_out(len(recordings), settings.fit.held_out, order)
    imitation = Imitation(student, embeddings, scale(recordings).to(embeddings.device))
    say("fit", 0, settings.fit.epochs)
    epoch, losses = fit_regression(
        student,
        imitation,
        recordings,
        settings.fit,
        held_out=held_out,
        order=order,
        on_epoch=curves.watch(say, "fit"),
    )
    student.refresh_token_table(embeddings)
    watched = held_out.nonzero()[:, 0]
    report = DistillReport(*explained(imitation, recordings, watched, settings.fit.batch_size), epoch, losses)
    report = save_finished(run, student, report, processes)
    curves.log_groups(_groups(report))
    return report


def _groups(report: DistillReport) -> dict[str, dict[str, float | None]]:
    return {"explained": report.explained, "explained between candidates": report.between_candidates}


def _with_states(part: Recordings, policy: Any) -> Recordings:
    states = [
        forward_sequences(policy, part.rows(index).sequences)[0].cpu()
        for index in torch.arange(len(part)).split(ROWS_PER_PASS)
    ]
    return replace(part, states=torch.cat(states))


def _refuse_conditioned(student: Any, teachers: Sequence[Any]) -> None:
    if isinstance(student, Critic) and student.conditioned:
        raise ConfigError(
            "the student is conditioned, but what teachers say is the same for all weights and every β.",
            "build it with composition='independent'.",
        )
    for critic in teachers:
        if isinstance(critic, Critic) and critic.conditioned:
            raise ConfigError(
                f"composition is 'conditioned' in the critic of {', '.join(critic.objectives)}, whose values depend on "
                "the weights and on β.",
                "distil critics that were trained with composition='independent' (improvement=independent).",
            )


def _check(student: HeadCritic, teacher: Critic, prompts: Sequence[str]) -> None:
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
    if isinstance(prompts, str) or not prompts:
        raise DataError(f"prompts is {prompts!r}, expected at least one prompt.", "pass a list of texts.")
