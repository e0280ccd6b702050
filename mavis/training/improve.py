"""Iterated KL-regularised policy improvement: roll out, score, fit, repeat."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis.critics import HiddenStateCritic, load_critic
from mavis.critics.fingerprint import Fingerprint, output_embedding
from mavis.critics.hidden_state import token_embeddings
from mavis.errors import ConfigError, DataError
from mavis.files import claimed, read_json, write_json
from mavis.rewards import Objective
from mavis.rollouts.collect import Plan, RolloutSettings, collect
from mavis.training.calibrate import calibrate
from mavis.training.features import extract
from mavis.training.fit import FitSettings, fit


@dataclass(frozen=True)
class ImprovementSettings:
    """How a critic is improved.

    Args:
        iterations: rounds of rollouts and fit, ≥ 1; the first evaluates the reference policy.
        rollouts: responses per iteration, ≥ 4; shared out equally over the objectives from iteration 1 on.
        beta: strength of the tilt that later iterations evaluate, > 0, in 1 / reward.
        zeta: ζ ≥ 0, price of a nat in reward; None is 1/β.
        later_rate: share of the fit's learning rate that rounds after the first use, > 0. Their heads start nearly
            right and see fewer rollouts each, so that full steps would put more noise in than they take out.
        calibration_samples: rollouts per point of the calibration sweep; 0 leaves the critic uncalibrated.
        sampling: of the rollouts.
        fit: of the heads.

    Raises:
        ConfigError: if a setting is out of range.
    """

    iterations: int = 2
    rollouts: int = 4096
    beta: float = 4.0
    zeta: float | None = None
    later_rate: float = 0.1
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
                "2 iterations of 4096 rollouts at beta 4 are a good start.",
            )
        if not 0 < self.later_rate < math.inf:
            raise ConfigError(f"later_rate is {self.later_rate}, expected > 0.", "the default is 0.1.")
        if self.zeta is not None and not 0 <= self.zeta < math.inf:
            raise ConfigError(f"zeta is {self.zeta}, expected ≥ 0.", "leave it out for 1/beta.")
        if self.calibration_samples < 0:
            raise ConfigError(
                f"calibration_samples is {self.calibration_samples}, expected ≥ 0.", "0 leaves the calibration out."
            )


@dataclass(frozen=True)
class IterationReport:
    """What one iteration came to.

    Args:
        iteration: counted from 0.
        rollouts: responses that were sampled.
        rewards: per objective, mean normalised reward of the rollouts sampled for it.
        kl: per objective, mean KL to the reference of those rollouts, nats per sequence.
        goal: per objective, J = reward − KL/β of those rollouts.
        explained: per objective, share of the returns' variance that the fitted heads explain on held-out rollouts;
            None where those do not vary.
        losses: held-out error before the first epoch and after each.
        critic: folder of the critic after the fit.
    """

    iteration: int
    rollouts: int
    rewards: dict[str, float]
    kl: dict[str, float]
    goal: dict[str, float]
    explained: dict[str, float | None]
    losses: list[float]
    critic: str


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def improve(
    policy: Any,
    tokenizer: Any,
    critic: HiddenStateCritic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
    folder: str | os.PathLike[str],
    settings: ImprovementSettings,
    *,
    progress: Progress | None = None,
) -> Iterator[IterationReport]:
    """Improve a critic by the paper's iteration, one report per round; the critic is trained in place.

    In round 0 the reference policy samples and every head learns its own objective's value. In each later round
    objective m is sampled under its own tilted policy, and its head learns what that policy earns:

        π_m ∝ π_ref exp(β Q_m),   Q_m(s_t, a_t) ← E_{π_m}[R_m − ζ Σ_{t'>t} KL_{t'}]

    Everything is written to `folder` as it is finished: the start, rollouts by shard, a critic and a report by
    iteration, and at the end the calibrated critic in `folder/critic`. The same call on the same folder goes on where
    it stopped.

    Args:
        policy: the reference policy; it stays as it is.
        tokenizer: its tokenizer.
        critic: the start.
        objectives: by name, in the critic's order.
        prompts: to sample from; each iteration draws them in a fresh order.
        folder: of this run.
        settings: how.
        progress: told how far each stage is.

    Yields:
        One report per iteration, finished ones of an earlier run included.

    Raises:
        ConfigError: if the objectives are not the critic's.
        DataError: if the folder belongs to a run with other settings.
        CriticError: if the critic is for another shape of policy, or an objective never varies.

    Source: MAVIS, arXiv 2508.13415.
    """
    _check(critic, objectives, prompts)
    settings.sampling.check(policy)
    critic.fingerprint.check(policy)
    critic.fingerprint = Fingerprint.of(policy)
    run, say = Path(folder), progress or (lambda stage, done, total: None)
    _claim(run, critic, prompts, settings)
    critic.to(output_embedding(policy).weight.device)  # type: ignore[arg-type]
    critic.calibration = None  # what was measured before does not hold for what is learnt now
    embeddings = token_embeddings(policy)
    zeta = 1 / settings.beta if settings.zeta is None else settings.zeta
    for iteration in range(settings.iterations):
        place = run / f"iteration-{iteration}"
        if (place / "report.json").is_file():
            _adopt(critic, place / "critic")
            yield IterationReport(**read_json(place / "report.json"))
            continue
        plan = _plan(iteration, prompts, len(critic.objectives), settings)
        sampling = replace(settings.sampling, seed=settings.sampling.seed + iteration)
        shards, stage = [], f"iteration {iteration}: rollouts"
        say(stage, 0, len(plan.prompts))
        for shard in collect(
            policy,
            tokenizer,
            objectives,
            plan,
            place / "rollouts",
            sampling,
            critic=critic if iteration else None,
            truncate_reference=True,
        ):
            shards.append(shard)
            say(stage, sum(map(len, shards)), len(plan.prompts))
        if iteration == 0:
            rewards = [torch.tensor(shard["rewards"][:], dtype=torch.float64) for shard in shards]
            critic.set_normalisation(torch.cat(rewards))
        told = _told(shards, f"iteration {iteration}: replay", say)
        features = extract(policy, told, embeddings, critic, sampling, tilted=iteration > 0)
        stage = f"iteration {iteration}: fit"
        say(stage, 0, settings.fit.epochs)
        fitted = fit(
            critic,
            features,
            embeddings,
            zeta,
            replace(
                settings.fit, learning_rate=settings.fit.learning_rate * (settings.later_rate if iteration else 1.0)
            ),
            seed=sampling.seed,
            on_epoch=lambda epoch, loss, stage=stage: say(stage, epoch, settings.fit.epochs),  # type: ignore[misc]
        )
        critic.save(place / "critic")
        report = IterationReport(
            iteration=iteration,
            rollouts=len(plan.prompts),
            **_means(critic, features.rewards, features.kl.sum(1), features.counts_for, settings.beta),
            explained=fitted.explained,
            losses=fitted.losses,
            critic=str(place / "critic"),
        )
        write_json(place / "report.json", asdict(report))
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
            progress=lambda done, total: say("calibration", done, total),
        )
    critic.save(run / "critic")


def _told(shards: Sequence[Any], stage: str, say: Progress) -> Iterator[Any]:
    """Pass shards on, saying how many have been worked on."""
    say(stage, 0, len(shards))
    for done, shard in enumerate(shards, start=1):
        yield shard
        say(stage, done, len(shards))


def _plan(iteration: int, prompts: Sequence[str], objectives: int, settings: ImprovementSettings) -> Plan:
    order = torch.Generator().manual_seed(settings.sampling.seed + iteration)
    rows: list[str] = []
    while len(rows) < settings.rollouts:
        rows.extend(prompts[i] for i in torch.randperm(len(prompts), generator=order).tolist())
    rows = rows[: settings.rollouts]
    if iteration == 0:
        return Plan.reference(rows, objectives)
    own = torch.eye(objectives, dtype=torch.float64)[torch.arange(len(rows)) % objectives]
    return Plan(rows, own, torch.full((len(rows),), settings.beta, dtype=torch.float64))


def _means(
    critic: HiddenStateCritic, rewards: Tensor, kl: Tensor, counts_for: Tensor, beta: float
) -> dict[str, dict[str, float]]:
    share = counts_for.double() / counts_for.sum(0).clamp_min(1)
    reward, distance = (rewards.double() * share).sum(0), (kl.double()[:, None] * share).sum(0)
    named = {"rewards": reward, "kl": distance, "goal": reward - distance / beta}
    return {name: dict(zip(critic.objectives, values.tolist(), strict=True)) for name, values in named.items()}


def _adopt(critic: HiddenStateCritic, folder: Path) -> None:
    critic.load_state_dict(load_critic(folder).state_dict())


def _claim(run: Path, critic: HiddenStateCritic, prompts: Sequence[str], settings: ImprovementSettings) -> None:
    claim = {
        "settings": asdict(settings),
        "objectives": list(critic.objectives),
        "critic": critic.settings(),
        "policy": critic.fingerprint.to_json(),
        "prompts": Plan.reference(prompts, 0).digest(),
    }
    if claimed(run / "run.json", claim, "a run with other"):
        _adopt(critic, run / "start")  # which may have been trained in place when the run broke off
        return
    critic.save(run / "start")
    write_json(run / "run.json", claim)


def _check(
    critic: HiddenStateCritic,
    objectives: Mapping[str, Objective],
    prompts: Sequence[str],
) -> None:
    if tuple(objectives) != critic.objectives:
        raise ConfigError(
            f"objectives are {', '.join(objectives)}, but the critic has: {', '.join(critic.objectives)}.",
            "pass the same names in the same order.",
        )
    if not prompts:
        raise DataError("prompts is empty.", "give at least one prompt.")
