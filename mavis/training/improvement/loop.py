"""Iterated KL-regularised policy improvement: roll out, score, fit, repeat."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mavis.critics.base import Composition
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import join_processes
from mavis.errors import ConfigError, DataError
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import Fingerprint
from mavis.policies.token_embeddings import token_embeddings
from mavis.rewards import Objective
from mavis.rollouts.collect import RolloutPlan, collect, load_shards
from mavis.rollouts.prompts import draw_prompts
from mavis.rollouts.sampler import GENERATE_SAMPLER, Sampler, sampler_identity
from mavis.rollouts.sampling import RolloutSettings
from mavis.training.improvement.calibrate import calibrate
from mavis.training.improvement.features import extract
from mavis.training.improvement.fit import FitSettings, fit
from mavis.training.improvement.report import IterationReport, means_by_goal
from mavis.training.metrics import Log, MetricLogger, record_training
from mavis.training.regression import draw_held_out
from mavis.training.rollout_tensors import concatenate_sharded
from mavis.training.run_folder import Progress, load_finished, open_run, save_finished

# Share of the drawn weights that are one objective alone: an even draw from the simplex never comes to its corners.
_CORNERS = 0.3


@dataclass(frozen=True)
class ImprovementSettings:
    """How a critic is improved.

    Args:
        composition: what is improved: the weighted goal of every λ under the policy of that λ (`conditioned`), or each
            objective under its own policy (`independent`, the paper's).
        iterations: rounds of rollouts and fit, ≥ 1; the first evaluates the reference policy.
        reuse: whether later iterations also learn from the rollouts of earlier ones, as if they told of the policy that
            is now evaluated. With return decomposition they do: a return is the value plus the advantages still to
            come whatever policy chose the tokens.
        rollouts: responses per iteration, ≥ 4; `independent` shares them out equally over the objectives from
            iteration 1 on, `conditioned` draws a λ for each.
        beta: strength of the tilt that later iterations evaluate, > 0, in 1 / reward; `conditioned` draws one for each
            rollout from a range about it.
        zeta: ζ ≥ 0, price of a nat in reward; None is 1/β. `conditioned` takes none: it learns the KL apart.
        min_beta: the smallest strength that `conditioned` draws, > 0; None is β/6. `independent` takes none.
        max_beta: the largest; None is 8β/3. The logarithm of the strength is drawn evenly.
        later_rate: share of the fit's learning rate that rounds after the first use, > 0. Their heads start nearly
            right and see fewer rollouts each, so that full steps would put more noise in than they take out.
        calibration_samples: rollouts per point of the calibration sweep; 0 leaves the critic uncalibrated.
        sampling: of the rollouts.
        fit: of the heads.

    Raises:
        ConfigError: if a setting is out of range.
    """

    composition: Composition = "conditioned"
    iterations: int = 3
    rollouts: int = 4096
    reuse: bool = True
    beta: float = 4.0
    zeta: float | None = None
    min_beta: float | None = None
    max_beta: float | None = None
    later_rate: float = 0.3
    calibration_samples: int = 64
    sampling: RolloutSettings = field(default_factory=RolloutSettings)
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        whole = {name: getattr(self, name) for name in ("iterations", "rollouts", "calibration_samples")}
        for name, value in whole.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} is {value!r}, expected a whole number.", f"e.g. {name}=64.")
        if self.iterations < 1 or self.rollouts < 4 or not 0 < self.beta < math.inf:
            raise ConfigError(
                f"iterations is {self.iterations}, rollouts {self.rollouts}, beta {self.beta}; expected ≥ 1, "
                "≥ 4 and > 0.",
                "3 iterations of 4096 rollouts at beta 4 are a good start.",
            )
        if not 0 < self.later_rate < math.inf:
            raise ConfigError(f"later_rate is {self.later_rate}, expected > 0.", "the default is 0.3.")
        if self.zeta is not None and not 0 <= self.zeta < math.inf:
            raise ConfigError(f"zeta is {self.zeta}, expected ≥ 0.", "leave it out for 1/beta.")
        if self.reuse and self.fit.target == "monte_carlo":
            raise ConfigError(
                "reuse is True, but plain Monte Carlo returns tell only of the policy that sampled them.",
                "set reuse to False, or the fit's target to decomposition.",
            )
        idle = ("zeta",) if self.composition == "conditioned" else ("min_beta", "max_beta")
        for name in idle:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, but the {self.composition} composition has no use for it.",
                    "leave it out, or choose the other composition.",
                )
        least, most = self.strengths
        if not 0 < least <= most < math.inf:
            raise ConfigError(
                f"min_beta is {least} and max_beta {most}; expected 0 < min_beta ≤ max_beta.",
                "left out, they are β/6 and 8β/3.",
            )
        if self.calibration_samples < 0:
            raise ConfigError(
                f"calibration_samples is {self.calibration_samples}, expected ≥ 0.", "0 leaves the calibration out."
            )

    @property
    def strengths(self) -> tuple[float, float]:
        """The least and the largest β that `conditioned` draws."""
        return (
            self.beta / 6 if self.min_beta is None else self.min_beta,
            8 * self.beta / 3 if self.max_beta is None else self.max_beta,
        )

    def settled(self) -> ImprovementSettings:
        """Fill in what was left out, as a run's folder and a critic's card tell it."""
        if self.composition == "independent":
            return replace(self, zeta=1 / self.beta if self.zeta is None else self.zeta)
        least, most = self.strengths
        return replace(self, min_beta=least, max_beta=most)


def improve(
    policy: Any,
    tokenizer: Any,
    critic: HeadCritic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: ImprovementSettings,
    *,
    sampler: Sampler = GENERATE_SAMPLER,
    progress: Progress | None = None,
    log: Log | None = None,
) -> Iterator[IterationReport]:
    """Improve a critic round by round, with a report for each; the critic is trained in place.

    In round 0 the reference policy samples and every head learns its own objective's value. In each later round the
    rollouts come from tilted policies, and the heads learn what those earn: `independent` is the paper's iteration, in
    which every objective has its own policy,

        π_m ∝ π_ref exp(β Q_m),   Q_m(s_t, a_t) ← E_{π_m}[R_m − ζ Σ_{t'>t} KL_{t'}]

    and `conditioned` is soft policy iteration for all weights and strengths at once, λ = β·w drawn for each rollout:

        π_λ ∝ π_ref exp(Σ_m λ_m Q_m(·; λ) − K(·; λ)),   Q_m(s_t, a_t; λ) ← E_{π_λ}[R_m],   K ← E_{π_λ}[Σ_{t'>t} KL_{t'}]

    With `reuse`, every rollout of an earlier round is read again for a policy of this one, drawn as this round's are.

    Everything is written to `folder` as it is finished: the start, rollouts by shard, a critic and a report by
    iteration, and at the end the calibrated critic in `folder/critic`. The same call on the same folder goes on where
    it stopped.

    Under `accelerate launch` or `torchrun` all processes make the same call: they share out the rollouts, their replay
    and every batch of the fit, and come to the critic of one process but for rounding. The main one alone writes,
    except for shards of rollouts, and is the only one to be told of progress.

    Args:
        policy: the reference policy; it stays as it is.
        tokenizer: its tokenizer.
        critic: the start.
        objectives: by name, in the critic's order.
        prompts: to sample from; each iteration draws them in a fresh order.
        folder: of this run.
        settings: how.
        sampler: draws the rollouts, such as `mavis.vllm.sampler.VllmSampler`; by default the policy's `generate`.
        progress: told how far each stage is.
        log: told the held-out error after each epoch and the figures of each iteration, see `MetricLogger`.

    Yields:
        One report per iteration, finished ones of an earlier run included.

    Raises:
        ConfigError: if the objectives or the composition are not the critic's, or the processes cannot work together.
        ProcessError: if a process runs something else than the others, does not see the folder, or has stopped.
        DataError: if the folder belongs to a run with other settings.
        CriticError: if the critic is for another shape of policy, or an objective never varies.

    Source: MAVIS, arXiv 2508.13415; its fixed point is not the optimum of a mixture, that of `conditioned` is.
    """
    _check(critic, objectives, prompts, settings.composition)
    settings = settings.settled()
    settings.sampling.check(policy)
    critic.fingerprint.check(policy)
    sampler.check(policy, critic)
    critic.fingerprint = Fingerprint.of(policy)
    processes = join_processes(states_device(policy))
    run, say = Path(folder), (progress if processes.is_main else None) or (lambda stage, done, total: None)
    open_run(run, critic, prompts, settings, processes, **sampler_identity(sampler))
    record_training(critic, policy, prompts, settings)
    curves = MetricLogger(log if processes.is_main else None, settings.fit.epochs)
    critic.to(states_device(policy))
    critic.calibration = None  # what was measured before does not hold for what is learnt now
    critic.decoding = settings.sampling.trained_decoding()
    embeddings = token_embeddings(policy)
    for iteration in range(settings.iterations):
        place = run / f"iteration-{iteration}"
        if (found := load_finished(place, critic, processes)) is not None:
            report = IterationReport(**found)
            curves.errors(report.losses, iteration)
            curves.log_groups(report.metrics(), report.iteration)
            yield report
            continue
        plan = _plan(iteration, prompts, len(critic.objectives), settings)
        sampling = _sampling(iteration, settings)
        shards = list(
            collect(
                policy,
                tokenizer,
                objectives,
                plan,
                place / "rollouts",
                sampling,
                critic=critic if iteration else None,
                truncate_reference=True,
                sampler=sampler,
                progress=partial(say, f"iteration {iteration}: rollouts"),
            )
        )
        if iteration == 0:
            rewards = [torch.tensor(shard["rewards"][:], dtype=torch.float64) for shard in shards]
            critic.set_normalisation(torch.cat(rewards))
            critic.max_trained_lambda.fill_(settings.strengths[1] if critic.conditioned else 0.0)
        rounds = [shards]
        if settings.reuse:
            rounds += [_read_again(run, iteration, j, prompts, critic, settings) for j in range(iteration)]
        decomposed = settings.fit.target == "decomposition"
        parts = [
            extract(
                policy,
                shards,
                embeddings,
                critic,
                sampling,
                tilted=iteration > 0,
                expectations=decomposed,
                processes=processes,
            )
            for shards in _told(rounds, f"iteration {iteration}: replay", say)
        ]
        if iteration == 0 and critic.conditioned:  # whatever λ they are told, the policy is the reference
            weights, betas = _draw(len(parts[0]), len(critic.objectives), settings, [sampling.seed])
            lam = (betas[:, None] * weights).float()[parts[0].local_indices]
            parts[0] = replace(parts[0], local_rollouts=replace(parts[0].local_rollouts, lam=lam))
        means = means_by_goal(critic, parts[0], settings.beta)
        held_out = [  # the same of every round, whichever round reads it
            draw_held_out(len(part), settings.fit.held_out, torch.Generator().manual_seed(_sampling(j, settings).seed))
            for part, j in zip(parts, [iteration, *range(iteration)], strict=False)
        ]
        features = concatenate_sharded(parts)
        del parts
        stage = f"iteration {iteration}: fit"
        say(stage, 0, settings.fit.epochs)
        fitted = fit(
            critic,
            features,
            embeddings,
            settings.zeta or 0.0,
            replace(
                settings.fit, learning_rate=settings.fit.learning_rate * (settings.later_rate if iteration else 1.0)
            ),
            seed=sampling.seed,
            held_out=torch.cat(held_out),
            on_policy=len(held_out[0]),
            on_epoch=curves.watch(say, stage, iteration),
        )
        report = IterationReport(
            iteration=iteration,
            rollouts=len(plan.prompts),
            **means,
            explained=fitted.explained,
            losses=fitted.losses,
            critic=str(place / "critic"),
        )
        report = save_finished(place, critic, report, processes)
        curves.log_groups(report.metrics(), report.iteration)
        yield report
    if settings.calibration_samples:
        critic.calibration = calibrate(
            policy,
            tokenizer,
            critic,
            objectives,
            prompts,
            run / "calibration",
            replace(settings.sampling, seed=settings.sampling.seed + settings.iterations),
            samples=settings.calibration_samples,
            sampler=sampler,
            progress=lambda done, total: say("calibration", done, total),
        )
    if processes.is_main:
        critic.save_pretrained(run / "critic")
    processes.barrier()  # who returns may rely on the critic to be there


def _told(rounds: Sequence[Sequence[Any]], stage: str, say: Progress) -> Iterator[Iterator[Any]]:
    """Pass the shards of all rounds on, saying how many have been worked on."""
    total, done = sum(map(len, rounds)), 0
    say(stage, 0, total)

    def one(shards: Sequence[Any]) -> Iterator[Any]:
        nonlocal done
        for shard in shards:
            yield shard
            done += 1
            say(stage, done, total)

    return map(one, rounds)


def _sampling(iteration: int, settings: ImprovementSettings) -> RolloutSettings:
    return replace(settings.sampling, seed=settings.sampling.seed + iteration)


def _read_again(
    run: Path,
    iteration: int,
    earlier: int,
    prompts: Sequence[str],
    critic: HeadCritic,
    settings: ImprovementSettings,
) -> list[Any]:
    """Read the rollouts of an earlier iteration, each with the λ of a policy of this one."""
    objectives = len(critic.objectives)
    plan, sampling = _plan(earlier, prompts, objectives, settings), _sampling(earlier, settings)
    shards = load_shards(plan, run / f"iteration-{earlier}" / "rollouts", sampling)
    weights, betas = _policies(len(plan.prompts), objectives, settings, [settings.sampling.seed, iteration, earlier])
    at, renamed = 0, []
    for shard in shards:
        rows = slice(at, at := at + len(shard))
        shard = shard.remove_columns(["weights", "beta"]).add_column("weights", weights[rows].tolist())
        renamed.append(shard.add_column("beta", betas[rows].tolist()))
    return renamed


def _plan(iteration: int, prompts: Sequence[str], objectives: int, settings: ImprovementSettings) -> RolloutPlan:
    rows = draw_prompts(prompts, settings.rollouts, settings.sampling.seed + iteration)
    if iteration == 0:
        return RolloutPlan.reference(rows, objectives)
    return RolloutPlan(rows, *_policies(len(rows), objectives, settings, [settings.sampling.seed + iteration]))


def _policies(rows: int, objectives: int, settings: ImprovementSettings, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Choose the policies that are to be evaluated: weights (N, M) and β (N,)."""
    if settings.composition == "conditioned":
        return _draw(rows, objectives, settings, seed)
    own = torch.eye(objectives, dtype=torch.float64)[torch.arange(rows) % objectives]
    return own, torch.full((rows,), settings.beta, dtype=torch.float64)


def _draw(rows: int, objectives: int, settings: ImprovementSettings, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw weights (N, M) evenly from the simplex, or one of its corners for a share of them, and β (N,)."""
    source = np.random.default_rng(seed)
    weights = torch.from_numpy(source.dirichlet(np.ones(objectives), rows))
    corners = torch.eye(objectives, dtype=torch.float64)[torch.from_numpy(source.integers(objectives, size=rows))]
    alone = torch.from_numpy(source.random(rows)) < _CORNERS
    least, most = settings.strengths
    logs = source.uniform(math.log(least), math.log(most), rows).tolist()
    # Not np.exp, which rounds differently on another CPU: there the run could not go on, nor a process take part.
    betas = torch.tensor([math.exp(log) for log in logs], dtype=torch.float64)
    return torch.where(alone[:, None], corners, weights), betas


def _check(
    critic: HeadCritic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    composition: Composition,
) -> None:
    if composition != critic.composition:
        raise ConfigError(
            f"composition is {composition!r}, but the critic is {critic.composition!r}.",
            f"build the critic with composition={composition!r}, or choose the other.",
        )
    if tuple(objectives) != critic.objectives:
        raise ConfigError(
            f"objectives are {', '.join(objectives)}, but the critic has: {', '.join(critic.objectives)}.",
            "pass the same names in the same order.",
        )
    if isinstance(prompts, str) or not prompts:
        raise DataError(f"prompts is {prompts!r}, expected at least one prompt.", "pass a list of texts.")
