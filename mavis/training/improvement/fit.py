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
    """The settings of `fit`: those of `RegressionSettings` and the regression target.

    Args:
        target: `decomposition` subtracts the later advantages from every return, which keeps its mean and removes most
            of its noise; `monte_carlo` is the paper's plain return.

    Raises:
        ConfigError: if a setting is out of range.

    Examples:
        >>> from mavis.training import FitSettings
        >>> settings = FitSettings(epochs=2)
        >>> settings.target, settings.weight_decay
        ('decomposition', 0.1)
    """

    weight_decay: float = 0.1
    target: Target = "decomposition"

    def __post_init__(self) -> None:
        if self.target not in ("decomposition", "monte_carlo"):
            raise ConfigError(f"target is {self.target!r}.", "known: decomposition, monte_carlo.")
        super().__post_init__()


@dataclass(frozen=True)
class FitReport:
    """The result of a fit.

    Args:
        explained: per objective, 1 − held-out squared error of Q / variance of the returns, for the epoch that is kept,
            over rollouts of the evaluated policies; None where the held-out returns do not vary. Early steps determine
            little of a return, so even exact values explain only a part.
        epoch: the epoch that is kept, counted from 1; 0 if none was better than the initial heads.
        losses: the held-out error before the first and after each epoch.

    Examples:
        >>> from mavis.training import FitReport
        >>> report = FitReport(explained={"positive": 0.4, "dialogue": None}, epoch=2, losses=[1.0, 0.8, 0.7])
        >>> report.losses[report.epoch]
        0.7
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

    The heads of a conditioned critic read the λ of the evaluated policy and learn its plain rewards, ζ = 0, and in the
    same way the KL still to come, in units of κ(λ):

        G_{t,M+1} = Σ_{t'>t} KL_{t'} / κ(λ)

    Token transitions are deterministic, so a return is exactly its value plus the later advantages; these have mean 0
    by construction, so they leave the expectation of every target unchanged. `monte_carlo` leaves them out. Since Q is
    linear in u_a, the expectation needs only E_{a∼π}[e_a], which the features hold.

    Args:
        critic: its heads, memory and trunk are trained; its normalisation and frozen parameters stay.
        features: the rollouts; all of them in every process, or sharded over the processes.
        embeddings: (V, E) float32, the e_a.
        zeta: ζ ≥ 0 in reward per nat; a conditioned critic, which learns the KL separately, does not use it.
        settings: of the fit.
        seed: of the split and the order.
        held_out: (N,) bool, the rollouts that only choose the epoch; None draws a share of `settings.held_out`.
        on_policy: number of rollouts, the first ones, that the evaluated policies sampled; None is all. The others have
            returns of other policies: they teach advantages, but Q alone does not predict their returns.
        on_epoch: called with each epoch's number and held-out error.

    Returns:
        The report.

    Raises:
        ConfigError: if there are fewer than four rollouts or fewer than processes, none is held out, or the target is
            `decomposition` and the readout `candidates`.
        TrainingError: if the error is not finite.
        ProcessError: if another process has stopped.

    Source: soft policy evaluation of MAVIS (arXiv 2508.13415); the decomposition of a return into advantages is the
    one of Direct Advantage Estimation (Pan et al., NeurIPS 2022).

    Examples:
        Six rollouts of three steps, in a world of seven tokens with one-hot embeddings:

        >>> import torch
        >>> from mavis.critics import HiddenStateCritic
        >>> from mavis.policies.fingerprint import Fingerprint
        >>> from mavis.training import FitSettings, fit
        >>> from mavis.training.improvement.features import Features
        >>> features = Features(
        ...     prompt_ids=torch.zeros(6, 1, dtype=torch.long),
        ...     is_prompt=torch.ones(6, 1, dtype=torch.bool),
        ...     states=torch.randn(6, 3, 5),
        ...     action_ids=torch.randint(7, (6, 3)),
        ...     is_response=torch.ones(6, 3, dtype=torch.bool),
        ...     expected=torch.full((6, 3, 7), 1 / 7),
        ...     kl=torch.zeros(6, 3),
        ...     rewards=torch.randn(6, 1),
        ...     lam=torch.ones(6, 1),
        ...     is_evaluated=torch.ones(6, 1, dtype=torch.bool),
        ... )
        >>> shape = Fingerprint("world", hidden_size=5, vocab_size=7, weights="none")
        >>> critic = HiddenStateCritic(("reward",), shape, embedding_size=7, hidden=4, rank=2)
        >>> report = fit(critic, features, torch.eye(7), zeta=0.25, settings=FitSettings(epochs=2), seed=0)
        >>> list(report.explained), len(report.losses)
        (['reward'], 3)
    """
    if len(features) < 4:
        raise ConfigError(
            f"there are {len(features)} rollouts to fit to, expected at least 4.", "sample at least a few hundred."
        )
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
    predictor.target = "monte_carlo"  # `explained` is about Q alone, without the later advantages
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
        """Compute the targets of the heads and the weight of each, (B, T, O) each."""
        returns = soft_returns(batch.rewards, batch.kl, self.zeta)
        weight = (batch.is_response[:, :, None] & batch.is_evaluated[:, None, :]).float()
        if not self.critic.conditioned:
            return returns, weight
        # In the tilt, a nat of K counts as much as 1/|λ| of a reward, so its error is weighted accordingly.
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
