"""The stages of one improvement iteration: sample, score, replay, fit, save; `improve` says in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup, join_processes
from mavis.errors import ConfigError, warn_user
from mavis.math.returns import whole_response_returns
from mavis.policies import Prompt
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.generation_config import end_token_ids
from mavis.policies.token_embeddings import token_embeddings
from mavis.rewards import Objective
from mavis.rollouts.collect import collect, critic_digest
from mavis.rollouts.sampler import GenerateSampler, Sampler, sampler_identity
from mavis.training.improvement.calibrate import calibrate
from mavis.training.improvement.features import Features, extract
from mavis.training.improvement.fit import FitReport, fit
from mavis.training.improvement.policies import draw_policies, plan_iteration, relabelled_shards, sampling_of
from mavis.training.improvement.report import (
    IterationReport,
    find_problems,
    find_rare_rewards,
    means_by_goal,
    share_cut_off,
)
from mavis.training.improvement.settings import ImprovementSettings
from mavis.training.metrics import Log, MetricLogger, record_training
from mavis.training.regression import draw_held_out
from mavis.training.rollout_tensors import ShardedRollouts, concatenate_sharded
from mavis.training.run_folder import Progress, load_finished, open_run, report_reuse, save_finished

Shards = Sequence[Any]
"""Datasets of rollouts, as `collect` yields them."""


@dataclass(frozen=True)
class ReplayedRollouts:
    """The training data of an iteration's fit.

    Args:
        features: of this iteration's own rollouts first and then, with `reuse`, of those of iterations 0, 1, ...
        is_held_out: (N,) bool, the rollouts that only choose the epoch. An iteration's rollouts are held out by a draw
            of their own, so that no later iteration trains on one that an earlier one held out.
        own: how many rollouts are this iteration's own.
        means: reward, KL and goal of these, goal by goal, see `means_by_goal`.
        cut_off: share of these that were cut off at the limit.
    """

    features: ShardedRollouts[Features]
    is_held_out: Tensor
    own: int
    means: dict[str, dict[str, float]]
    cut_off: float


@dataclass(frozen=True)
class ImprovementStages:
    """One run of `improve`, with a method for each of its stages.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: trained in place.
        objectives: by name, in the critic's order.
        prompts: to sample from.
        folder: of the run.
        settings: resolved.
        sampler: draws the rollouts.
        processes: the group that shares the work.
        embeddings: (V, E) float32, the policy's scaled token embeddings.
        report_progress: called with stage, done and total; does nothing outside the main process.
        logger: takes the metrics; does nothing outside the main process.
    """

    policy: Any
    tokenizer: Any
    critic: HeadCritic
    objectives: Mapping[str, Objective]
    prompts: Sequence[Prompt]
    folder: Path
    settings: ImprovementSettings
    sampler: Sampler
    processes: ProcessGroup
    embeddings: Tensor
    report_progress: Progress
    logger: MetricLogger

    @classmethod
    def start(
        cls,
        policy: Any,
        tokenizer: Any,
        critic: HeadCritic,
        objectives: Mapping[str, Objective],
        prompts: Sequence[Prompt],
        folder: Path,
        settings: ImprovementSettings,
        *,
        sampler: Sampler,
        progress: Progress | None,
        log: Log | None,
    ) -> ImprovementStages:
        """Check the arguments of `improve` against each other and open the run's folder."""
        settings = settings.resolved()
        settings.sampling.check(policy)
        critic.fingerprint.check(policy)
        sampler.check(policy, critic)
        if settings.kl_label == "whole_response":
            if not isinstance(sampler, GenerateSampler):
                raise ConfigError(
                    f"kl_label is 'whole_response', but the sampler {sampler.name!r} does not record log-ratios.",
                    "use the sampler `generate`, or kl_label=to_come.",
                )
            sampler = GenerateSampler(log_ratios=True)
        critic.fingerprint = Fingerprint.of(policy)
        device = states_device(policy)
        processes = join_processes(device)
        identity = sampler_identity(sampler)
        raised = open_run(
            folder, critic, prompts, settings, processes, objectives=objectives, raisable="iterations", **identity
        )
        if processes.is_main and (folder / "critic").is_dir():
            report_reuse(folder, raised=raised)
        record_training(critic, policy, prompts, settings)
        critic.to(device)
        critic.calibration = None  # an earlier calibration does not hold for the new heads
        critic.decoding = settings.sampling.trained_decoding()
        return cls(
            policy,
            tokenizer,
            critic,
            objectives,
            prompts,
            folder,
            settings,
            sampler,
            processes,
            token_embeddings(policy),
            (progress if processes.is_main else None) or (lambda stage, done, total: None),
            MetricLogger(log if processes.is_main else None, settings.fit.epochs),
        )

    def load_finished(self, iteration: int) -> IterationReport | None:
        """Load the critic and the report of an iteration that an earlier call finished; None if there is none."""
        report = load_finished(self._place(iteration), self.critic, IterationReport, self.processes)
        if report is not None:
            self.logger.errors(report.losses, iteration)
        return report

    def sample(self, iteration: int) -> Shards:
        """Sample and score the rollouts of an iteration; shards already on disk are not sampled again."""
        return list(
            collect(
                self.policy,
                self.tokenizer,
                self.objectives,
                plan_iteration(iteration, self.prompts, len(self.critic.objectives), self.settings),
                self._place(iteration) / "rollouts",
                sampling_of(iteration, self.settings),
                critic=self.critic if iteration else None,
                truncate_reference=True,
                sampler=self.sampler,
                progress=partial(self.report_progress, f"iteration {iteration}: rollouts"),
            )
        )

    def set_scale(self, reference_shards: Shards) -> None:
        """Estimate the normalisation of rewards from the reference policy's rollouts, and note the range of λ."""
        rewards = [torch.tensor(shard["rewards"][:], dtype=torch.float64) for shard in reference_shards]
        raw = torch.cat(rewards)
        self.critic.set_normalisation(raw)
        for problem in find_rare_rewards(self.critic.objectives, raw) if self.processes.is_main else ():
            warn_user(problem)
        self.critic.max_trained_lambda.fill_(self.settings.strengths[1] if self.critic.conditioned else 0.0)

    def replay(self, iteration: int, shards: Shards) -> ReplayedRollouts:
        """Replay an iteration's rollouts and, with `reuse`, those of earlier ones under policies of this iteration."""
        settings, sources = self.settings, [shards]
        if settings.reuse:
            objectives = len(self.critic.objectives)
            sources += [
                relabelled_shards(self.folder, iteration, j, self.prompts, objectives, settings)
                for j in range(iteration)
            ]
        parts = [
            extract(
                self.policy,
                counted,
                self.embeddings,
                self.critic,
                sampling_of(iteration, settings),
                tilted=iteration > 0,
                expectations=settings.fit.target == "decomposition",
                processes=self.processes,
            )
            for counted in self._counted(sources, f"iteration {iteration}: replay")
        ]
        if iteration == 0 and self.critic.conditioned:
            parts[0] = self._with_drawn_lambda(parts[0])
        held_out = [
            draw_held_out(
                len(part), settings.fit.held_out, torch.Generator().manual_seed(sampling_of(j, settings).seed)
            )
            for part, j in zip(parts, [iteration, *range(iteration)], strict=False)
        ]
        means, own = means_by_goal(self.critic, parts[0], settings.beta), len(parts[0])
        if iteration and settings.kl_label == "whole_response":
            parts[0] = self._with_priced_log_ratio(parts[0], shards)
        cut_off = share_cut_off(shards, end_token_ids(self.policy))
        return ReplayedRollouts(concatenate_sharded(parts), torch.cat(held_out), own, means, cut_off)

    def fit(self, iteration: int, replayed: ReplayedRollouts) -> FitReport:
        """Fit the heads to the returns of the replayed rollouts."""
        settings, stage = self.settings, f"iteration {iteration}: fit"
        rate = settings.fit.learning_rate * (settings.later_rate if iteration else 1.0)
        self.report_progress(stage, 0, settings.fit.epochs)
        return fit(
            self.critic,
            replayed.features,
            self.embeddings,
            (settings.zeta or 0.0) if settings.kl_label == "to_come" else 0.0,
            replace(settings.fit, learning_rate=rate),
            seed=sampling_of(iteration, settings).seed,
            held_out=replayed.is_held_out,
            on_policy=replayed.own,
            on_epoch=self.logger.watch(self.report_progress, stage, iteration),
        )

    def save(self, iteration: int, replayed: ReplayedRollouts, fitted: FitReport) -> IterationReport:
        """Write an iteration's critic and report."""
        place = self._place(iteration)
        report = IterationReport(
            iteration=iteration,
            rollouts=self.settings.rollouts,
            **replayed.means,
            explained=fitted.explained,
            losses=fitted.losses,
            critic=str(place / "critic"),
            cut_off=replayed.cut_off,
        )
        return save_finished(place, self.critic, report, self.processes)

    def warn(self, report: IterationReport, before: IterationReport | None) -> None:
        """Warn of what makes an iteration look useless; see `find_problems`."""
        for problem in find_problems(report, before) if self.processes.is_main else ():
            warn_user(problem)

    def calibrate(self) -> None:
        """Measure KL along β, unless `calibration_samples` is 0, and save the finished critic."""
        settings = self.settings
        if settings.calibration_samples:
            self.critic.calibration = calibrate(
                self.policy,
                self.tokenizer,
                self.critic,
                self.objectives,
                self.prompts,
                self.folder / "calibration",
                sampling_of(settings.iterations, settings),
                samples=settings.calibration_samples,
                sampler=self.sampler,
                progress=partial(self.report_progress, "calibration"),
            )
        if self.processes.is_main:
            self._keep_efficiency()
            self.critic.save_pretrained(self.folder / "critic")
        self.processes.barrier()  # so that every process can read the critic when improve returns

    def _keep_efficiency(self) -> None:
        """Keep what an evaluation of the same critic has measured, which is saved beside it."""
        place = self.folder / "critic"
        if place.is_dir():
            before = Critic.from_pretrained(place)
            if "efficiency" in before.about and critic_digest(before) == critic_digest(self.critic):
                self.critic.about["efficiency"] = before.about["efficiency"]

    def _place(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration}"

    def _with_drawn_lambda(self, features: ShardedRollouts[Features]) -> ShardedRollouts[Features]:
        """Relabel reference rollouts with drawn λ: the heads learn that λ makes no difference there."""
        seed = [sampling_of(0, self.settings).seed]
        weights, betas = draw_policies(len(features), len(self.critic.objectives), self.settings, seed)
        lam = (betas[:, None] * weights).float()[features.local_indices]
        return replace(features, local_rollouts=replace(features.local_rollouts, lam=lam))

    def _with_priced_log_ratio(self, features: ShardedRollouts[Features], shards: Shards) -> ShardedRollouts[Features]:
        """Subtract the price of each response's log-ratio from its rewards, once for all of its steps."""
        log_ratio = torch.tensor(
            [
                ratio
                for shard in shards
                for ratio, ids in zip(shard["log_ratio"], shard["response_ids"], strict=True)
                if ids
            ]
        )[features.local_indices]
        local = features.local_rollouts
        priced = whole_response_returns(local.rewards, log_ratio, self.settings.zeta or 0.0)
        return replace(features, local_rollouts=replace(local, rewards=priced))

    def _counted(self, sources: Sequence[Shards], stage: str) -> Iterator[Iterator[Any]]:
        """Iterate over the shards of every source, reporting progress over all of them."""
        total, done = sum(map(len, sources)), 0
        self.report_progress(stage, 0, total)

        def count(shards: Shards) -> Iterator[Any]:
            nonlocal done
            for shard in shards:
                yield shard
                done += 1
                self.report_progress(stage, done, total)

        return map(count, sources)
