"""Fitting the value heads to the returns of rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mavis.critics.headed import HeadedCritic
from mavis.errors import ConfigError
from mavis.math.mixture import kl_unit
from mavis.math.returns import later_sum, soft_returns
from mavis.training.features import Features

Target = Literal["decomposition", "monte_carlo"]


@dataclass(frozen=True)
class FitSettings:
    """How heads are fitted.

    Args:
        epochs: passes over the rollouts, ≥ 1; the one with the smallest held-out error is kept.
        batch_size: rollouts per step, ≥ 1.
        learning_rate: the peak, reached after a tenth of the steps and falling to 0 along a cosine.
        trunk_rate: share of it that the trunk of a value model learns with, > 0.
        weight_decay: of AdamW.
        held_out: share of the rollouts that only choose the epoch, 0 < share < 1.
        target: `decomposition` subtracts the later advantages from every return, which leaves its mean and takes away
            most of its noise; `monte_carlo` is the paper's plain return.

    Raises:
        ConfigError: if a setting is out of range.
    """

    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 3e-3
    trunk_rate: float = 0.1
    weight_decay: float = 1e-2
    held_out: float = 0.1
    target: Target = "decomposition"

    def __post_init__(self) -> None:
        if self.target not in ("decomposition", "monte_carlo"):
            raise ConfigError(f"target is {self.target!r}.", "known: decomposition, monte_carlo.")
        if not 0 < self.held_out < 1 or self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(
                f"held_out is {self.held_out}, epochs {self.epochs}, batch_size {self.batch_size}; expected "
                "0 < held_out < 1 and the others ≥ 1.",
                "the defaults are 0.1, 6 and 32.",
            )
        rates = self.learning_rate, self.trunk_rate
        if not all(0 < rate < math.inf for rate in rates) or not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}, trunk_rate {self.trunk_rate} and weight_decay "
                f"{self.weight_decay}; expected > 0, > 0 and ≥ 0.",
                "the defaults are 3e-3, 0.1 and 1e-2.",
            )


@dataclass(frozen=True)
class FitReport:
    """What a fit came to.

    Args:
        explained: per objective, 1 − held-out squared error of Q / variance of the returns, for the epoch that is kept;
            None where the held-out returns do not vary. Early steps know little, so even exact values explain a part.
        epoch: which epoch that is, counted from 1; 0 if none was better than the heads at the start.
        losses: the held-out error before the first and after each epoch.
    """

    explained: dict[str, float | None]
    epoch: int
    losses: list[float]


def fit(
    critic: HeadedCritic,
    features: Features,
    embeddings: Tensor,
    zeta: float,
    settings: FitSettings,
    *,
    seed: int,
    held_out: Tensor | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> FitReport:
    """Fit the heads of a critic to soft returns, in place.

        G_{t,m} = R_m − ζ Σ_{t'>t} KL_{t'}
        min Σ_{t,m} (Q_m(s_t, a_t) + Σ_{t'>t} A_m(s_{t'}, a_{t'}) − G_{t,m})²,  A_m = Q_m(s, a) − E_{a'∼π} Q_m(s, a')

    The heads of a conditioned critic read the λ of the policy that sampled and learn its plain rewards, ζ = 0, and in
    the same way the KL that it still spent, in units of κ(λ):

        G_{t,M+1} = Σ_{t'>t} KL_{t'} / κ(λ)

    The token process is deterministic, so a return is its value plus the advantages still to come, exactly; their mean
    is 0 by construction, so counting them changes no target's expectation. With `monte_carlo` they are left out. Since
    Q is linear in u_a, the expectation needs only E_{a∼π}[e_a], which the features hold.

    Args:
        critic: its heads, memory and trunk are the start and the result; its normalisation and whatever requires no
            gradient stay.
        features: the rollouts.
        embeddings: (V, E) float32, the e_a.
        zeta: ζ ≥ 0 in reward per nat; a conditioned critic, which learns the KL apart, does not use it.
        settings: how.
        seed: of the split and the order.
        held_out: (N,) bool, the rollouts that only choose the epoch; None draws `settings.held_out` of them.
        on_epoch: called with each epoch's number and held-out error.

    Returns:
        The report.

    Raises:
        ConfigError: if there are fewer than four rollouts, or decomposition is asked for a readout that would have to
            read every candidate at every step.

    Source: soft policy evaluation of MAVIS (arXiv 2508.13415); the decomposition of a return into advantages is the
    one of Direct Advantage Estimation (Pan et al., NeurIPS 2022).
    """
    if len(features) < 4:
        raise ConfigError(f"there are {len(features)} rollouts to fit to.", "sample at least a few hundred.")
    if settings.target == "decomposition" and critic.projection is None:
        raise ConfigError(
            "target is 'decomposition', but the readout 'candidates' would have to read every candidate at every step.",
            "set target to monte_carlo and reuse to False, or choose the token readout.",
        )
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=critic.reward_mean.device.type == "cpu")
    network = predictor = _Predictor(critic, embeddings, 0.0 if critic.conditioned else zeta, settings.target)
    optimiser = torch.optim.AdamW(
        _groups(critic, settings), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    network, optimiser = accelerator.prepare(network, optimiser)
    order = torch.Generator().manual_seed(seed)
    if held_out is None:
        held_out = draw_held_out(len(features), settings.held_out, order)
    watched, training = features.rows(held_out.nonzero()[:, 0]), (~held_out).nonzero()[:, 0]
    batches = math.ceil(len(training) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(settings.epochs * batches))

    critic.eval()
    losses = [_error(network, watched, settings, accelerator.device)[0].mean().item()]
    best, best_state = 0, _state(critic)
    for epoch in range(1, settings.epochs + 1):
        critic.train()
        for index in training[torch.randperm(len(training), generator=order)].split(settings.batch_size):
            batch = _to(features.rows(index), accelerator.device)
            squared, weight = network(batch)
            optimiser.zero_grad()
            accelerator.backward(squared.sum() / weight.sum().clamp_min(1))
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        critic.eval()
        losses.append(_error(network, watched, settings, accelerator.device)[0].mean().item())
        if losses[-1] < losses[best]:
            best, best_state = epoch, _state(critic)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    critic.load_state_dict(best_state, strict=False)
    critic.refresh_token_table(embeddings)
    predictor.target = "monte_carlo"  # what Q itself explains, without the advantages that were yet to come
    error, variance = _error(network, watched, settings, accelerator.device)
    explained = [
        1 - wrong / spread if spread > 1e-5 else None
        for wrong, spread in zip(error.tolist(), variance.tolist(), strict=True)
    ][: len(critic.objectives)]
    return FitReport(dict(zip(critic.objectives, explained, strict=True)), best, losses)


def draw_held_out(rollouts: int, share: float, source: torch.Generator) -> Tensor:
    """Choose the rollouts that only choose the epoch: (N,) bool with at least one of each kind."""
    chosen = torch.zeros(rollouts, dtype=torch.bool)
    count = min(max(1, round(share * rollouts)), rollouts - 1)
    chosen[torch.randperm(rollouts, generator=source)[:count]] = True
    return chosen


def _groups(critic: HeadedCritic, settings: FitSettings) -> list[dict[str, Any]]:
    slow = [parameter for parameter in critic.trunk_parameters() if parameter.requires_grad]
    others = {id(parameter) for parameter in slow}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in critic.parameters() if p.requires_grad and id(p) not in others]}
    ]
    return [*groups, {"params": slow, "lr": settings.learning_rate * settings.trunk_rate}] if slow else groups


class _Predictor(nn.Module):
    """The squared error of every step's prediction of its return."""

    def __init__(self, critic: HeadedCritic, embeddings: Tensor, zeta: float, target: Target) -> None:
        super().__init__()
        self.critic, self.zeta, self.target = critic, zeta, target
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, batch: Features) -> tuple[Tensor, Tensor]:
        """Return squared errors and weights, (B, T, O) each; errors are already weighted."""
        critic, embeddings = self.critic, self.embeddings
        assert isinstance(embeddings, Tensor)
        ids = torch.cat([batch.prompt_ids, batch.action_ids], dim=1)
        is_token = torch.cat([batch.is_prompt, batch.is_response], dim=1)
        heads = critic.heads(critic.inputs_of_rollouts(ids, is_token, batch.states), batch.lam[:, None])
        slope, prediction = heads[..., :-1], heads[..., -1]
        if critic.projection is not None:
            actions = critic.projection(embeddings[batch.action_ids])
            prediction = prediction + torch.einsum("btor,btr->bto", slope, actions)
        if self.target == "decomposition":
            assert critic.projection is not None
            surprise = actions - critic.projection(batch.expected)
            advantage = torch.einsum("btor,btr->bto", slope, surprise) * batch.is_response[:, :, None]
            prediction = prediction + later_sum(advantage)
        returns, weight = self.returns(batch)
        return (prediction - returns).square() * weight, weight

    def returns(self, batch: Features) -> tuple[Tensor, Tensor]:
        """Compute what the heads are to predict and what each prediction weighs, (B, T, O) each."""
        returns = soft_returns(batch.rewards, batch.kl, self.zeta)
        weight = (batch.is_response[:, :, None] & batch.counts_for[:, None, :]).float()
        if not self.critic.conditioned:
            return returns, weight
        # A nat of K counts in the tilt as much as 1/|λ| of a reward: so much does its error weigh.
        size = batch.lam.abs().sum(1)[:, None, None]
        later_kl = later_sum(batch.kl)[:, :, None] / kl_unit(batch.lam)[:, None].clamp_min(1e-6)
        share = batch.is_response[:, :, None] * (size / (1 + size)).square()
        return torch.cat([returns, later_kl], dim=-1), torch.cat([weight, share], dim=-1)


@torch.no_grad()
def _error(
    network: nn.Module, features: Features, settings: FitSettings, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the mean squared error and the variance of the returns, per output, (O,) each."""
    predictor: Any = getattr(network, "module", network)
    squared = weights = first = second = torch.zeros((), device=device)
    for index in torch.arange(len(features)).split(settings.batch_size):
        batch = _to(features.rows(index), device)
        error, weight = network(batch)
        returns, _ = predictor.returns(batch)
        squared = squared + error.sum((0, 1))
        weights = weights + weight.sum((0, 1))
        first = first + (returns * weight).sum((0, 1))
        second = second + (returns.square() * weight).sum((0, 1))
    weights = weights.clamp_min(1e-6)
    return squared / weights, second / weights - (first / weights).square()


def _to(features: Features, device: torch.device) -> Features:
    return Features(**{name: tensor.to(device) for name, tensor in vars(features).items()})


def _state(critic: HeadedCritic) -> dict[str, Tensor]:
    """Copy all that a fit may change: a frozen trunk can be too large to be held twice."""
    frozen = {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in critic.state_dict().items() if name not in frozen}


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
