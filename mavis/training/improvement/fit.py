"""Fitting the value heads to the returns of rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mavis.critics.head_critic import HeadCritic
from mavis.distributed import join_processes
from mavis.errors import ConfigError
from mavis.math.mixture import kl_unit
from mavis.math.returns import reverse_cumsum_exclusive, soft_returns
from mavis.training.improvement.features import Features
from mavis.training.regression import (
    RegressionSettings,
    draw_held_out,
    explained_share,
    fit_regression,
    mean_error,
    sums_over,
)
from mavis.training.rollout_tensors import ShardedRollouts

Target = Literal["decomposition", "monte_carlo"]


@dataclass(frozen=True)
class FitSettings(RegressionSettings):
    """How heads are fitted: as `RegressionSettings` says, to what `target` names.

    Args:
        target: `decomposition` subtracts the later advantages from every return, which leaves its mean and takes away
            most of its noise; `monte_carlo` is the paper's plain return.

    Raises:
        ConfigError: if a setting is out of range.
    """

    weight_decay: float = 0.1
    target: Target = "decomposition"

    def __post_init__(self) -> None:
        if self.target not in ("decomposition", "monte_carlo"):
            raise ConfigError(f"target is {self.target!r}.", "known: decomposition, monte_carlo.")
        super().__post_init__()


@dataclass(frozen=True)
class FitReport:
    """What a fit came to.

    Args:
        explained: per objective, 1 − held-out squared error of Q / variance of the returns, for the epoch that is kept,
            over the rollouts of the policies whose values these are; None where the held-out returns do not vary. Early
            steps know little, so even exact values explain a part.
        epoch: which epoch that is, counted from 1; 0 if none was better than the heads at the start.
        losses: the held-out error before the first and after each epoch.
    """

    explained: dict[str, float | None]
    epoch: int
    losses: list[float]


def fit(
    critic: HeadCritic,
    features: Features | ShardedRollouts[Features],
    embeddings: Tensor,
    zeta: float,
    settings: FitSettings,
    *,
    seed: int,
    held_out: Tensor | None = None,
    on_policy: int | None = None,
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
        features: the rollouts; all of them in every process, or shared out over the processes.
        embeddings: (V, E) float32, the e_a.
        zeta: ζ ≥ 0 in reward per nat; a conditioned critic, which learns the KL apart, does not use it.
        settings: how.
        seed: of the split and the order.
        held_out: (N,) bool, the rollouts that only choose the epoch; None draws `settings.held_out` of them.
        on_policy: how many rollouts, the first ones, were sampled by the policies that are evaluated; None is all. The
            others, read again, have other policies' returns: they teach advantages, but Q alone does not foretell them.
        on_epoch: called with each epoch's number and held-out error.

    Returns:
        The report.

    Raises:
        ConfigError: if there are fewer than four rollouts or fewer than processes, none is held out, or decomposition
            is asked for a readout that would have to read every candidate at every step.
        TrainingError: if the error is not finite.
        ProcessError: if another process has stopped.

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
    predictor = _Predictor(critic, embeddings, 0.0 if critic.conditioned else zeta, settings.target)
    device = critic.reward_mean.device
    shared = (
        features if isinstance(features, ShardedRollouts) else ShardedRollouts.shard(features, join_processes(device))
    )
    order = torch.Generator().manual_seed(seed)
    if held_out is None:
        held_out = draw_held_out(len(shared), settings.held_out, order)
    best, losses = fit_regression(
        critic, predictor, shared, settings, held_out=held_out, order=order, on_epoch=on_epoch
    )
    critic.refresh_token_table(embeddings)
    predictor.target = "monte_carlo"  # what Q itself explains, without the advantages that were yet to come
    watched = held_out[:on_policy].nonzero()[:, 0]
    if not len(watched):
        raise ConfigError(f"none of the first {on_policy} rollouts is held out.", "hold out at least one.")
    error = mean_error(predictor, shared, watched, settings.batch_size, device)
    variance = _variance(predictor, shared, watched, settings.batch_size, device)
    return FitReport(explained_share(critic.objectives, error, variance), best, losses)


class _Predictor(nn.Module):
    """The squared error of every step's prediction of its return."""

    def __init__(self, critic: HeadCritic, embeddings: Tensor, zeta: float, target: Target) -> None:
        super().__init__()
        self.critic, self.zeta, self.target = critic, zeta, target
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, batch: Features) -> tuple[Tensor, Tensor]:
        """Return squared errors and weights, (B, T, O) each; errors are already weighted."""
        critic, embeddings = self.critic, self.embeddings
        assert isinstance(embeddings, Tensor)
        heads = critic.heads(batch.inputs_of(critic), batch.lam[:, None])
        slope, prediction = heads[..., :-1], heads[..., -1]
        if critic.projection is not None:
            actions = critic.projection(embeddings[batch.action_ids])
            prediction = prediction + torch.einsum("btor,btr->bto", slope, actions)
        if self.target == "decomposition":
            assert critic.projection is not None
            surprise = actions - critic.projection(batch.expected)
            advantage = torch.einsum("btor,btr->bto", slope, surprise) * batch.is_response[:, :, None]
            prediction = prediction + reverse_cumsum_exclusive(advantage)
        returns, weight = self.returns(batch)
        return (prediction - returns).square() * weight, weight

    def returns(self, batch: Features) -> tuple[Tensor, Tensor]:
        """Compute what the heads are to predict and what each prediction weighs, (B, T, O) each."""
        returns = soft_returns(batch.rewards, batch.kl, self.zeta)
        weight = (batch.is_response[:, :, None] & batch.is_evaluated[:, None, :]).float()
        if not self.critic.conditioned:
            return returns, weight
        # A nat of K counts in the tilt as much as 1/|λ| of a reward: so much does its error weigh.
        size = batch.lam.abs().sum(1)[:, None, None]
        later_kl = reverse_cumsum_exclusive(batch.kl)[:, :, None] / kl_unit(batch.lam)[:, None].clamp_min(1e-6)
        share = batch.is_response[:, :, None] * (size / (1 + size)).square()
        return torch.cat([returns, later_kl], dim=-1), torch.cat([weight, share], dim=-1)


@torch.no_grad()
def _variance(
    predictor: _Predictor, features: ShardedRollouts[Features], index: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Compute the variance of the returns, per output, (O,)."""

    def moments(batch: Features) -> list[Tensor]:
        returns, weight = predictor.returns(batch)
        return [weight, returns * weight, returns.square() * weight]

    weights, first, second = sums_over(features, index, batch_size, device, moments)
    weights = weights.clamp_min(1e-6)
    return second / weights - (first / weights).square()
