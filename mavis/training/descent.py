"""What every fit of heads does: go through the rollouts again and again, and keep the best it has been."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mavis.critics.headed import HeadedCritic
from mavis.errors import ConfigError, TrainingError, check_whole
from mavis.training.replayed import Replayed


@dataclass(frozen=True)
class DescentSettings:
    """How the squared error of heads is brought down.

    Args:
        epochs: passes over the rollouts, ≥ 1; the one with the smallest held-out error is kept.
        batch_size: rollouts per step, ≥ 1.
        learning_rate: the peak, reached after a tenth of the steps and falling to 0 along a cosine.
        trunk_rate: share of it that the trunk of a value model learns with, > 0.
        weight_decay: of AdamW.
        held_out: share of the rollouts that only choose the epoch, 0 < share < 1.

    Raises:
        ConfigError: if a setting is out of range.
    """

    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 3e-3
    trunk_rate: float = 0.1
    weight_decay: float = 1e-2
    held_out: float = 0.1

    def __post_init__(self) -> None:
        check_whole(ConfigError, "the defaults are 6 and 32.", epochs=self.epochs, batch_size=self.batch_size)
        for name in ("held_out", "learning_rate", "trunk_rate", "weight_decay"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} is {value!r}, expected a number.", "e.g. learning_rate=3e-3.")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}, expected 0 < held_out < 1.", "the default is 0.1.")
        rates = self.learning_rate, self.trunk_rate
        if not all(0 < rate < math.inf for rate in rates) or not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}, trunk_rate {self.trunk_rate} and weight_decay "
                f"{self.weight_decay}; expected > 0, > 0 and ≥ 0.",
                "the defaults are 3e-3, 0.1 and 1e-2.",
            )


def descend(
    critic: HeadedCritic,
    network: nn.Module,
    rollouts: Replayed,
    settings: DescentSettings,
    *,
    held_out: Tensor,
    order: torch.Generator,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[int, list[float]]:
    """Bring a squared error down over the parameters of a critic, in place.

    Args:
        critic: the start and the result, as it was after the epoch with the smallest held-out error; its token table
            is to be refreshed.
        network: holds the critic; maps a batch to its squared errors, already weighted, and their weights, (B, T, O)
            each.
        rollouts: to learn from.
        settings: how.
        held_out: (N,) bool, the rollouts that only choose the epoch.
        order: of the rollouts.
        on_epoch: called with each epoch's number and held-out error.

    Returns:
        The epoch that is kept, counted from 1, 0 if none was better than the start; and the held-out error before the
        first epoch and after each.

    Raises:
        TrainingError: if an error is not finite; the critic is as it was then.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=critic.reward_mean.device.type == "cpu")
    optimiser = torch.optim.AdamW(
        _groups(critic, settings), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    network, optimiser = accelerator.prepare(network, optimiser)
    watched, training = rollouts.rows(held_out.nonzero()[:, 0]), (~held_out).nonzero()[:, 0]
    batches = math.ceil(len(training) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(settings.epochs * batches))

    def watch() -> float:
        critic.eval()
        return mean_error(network, watched, settings.batch_size, accelerator.device).mean().item()

    losses = [watch()]
    best, best_state = 0, _state(critic)
    for epoch in range(1, settings.epochs + 1):
        critic.train()
        for index in training[torch.randperm(len(training), generator=order)].split(settings.batch_size):
            squared, weight = network(rollouts.rows(index).to(accelerator.device))
            optimiser.zero_grad()
            accelerator.backward(squared.sum() / weight.sum().clamp_min(1))
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        losses.append(watch())
        if not math.isfinite(losses[0] + losses[-1]):
            raise TrainingError(
                f"the held-out error was {losses[0]} before the fit and is {losses[-1]} after epoch {epoch}.",
                "lower the learning rate; if the error was not finite before, look for NaN in what is learnt from.",
            )
        if losses[-1] < losses[best]:
            best, best_state = epoch, _state(critic)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    critic.load_state_dict(best_state, strict=False)
    return best, losses


@torch.no_grad()
def mean_error(network: nn.Module, rollouts: Replayed, batch_size: int, device: torch.device) -> Tensor:
    """Compute the mean squared error of each output, (O,)."""
    squared = weights = torch.zeros((), device=device)
    for index in torch.arange(len(rollouts)).split(batch_size):
        error, weight = network(rollouts.rows(index).to(device))
        squared = squared + error.sum((0, 1))
        weights = weights + weight.sum((0, 1))
    return squared / weights.clamp_min(1e-6)


def explained_share(names: Sequence[str], error: Tensor, variance: Tensor) -> dict[str, float | None]:
    """Tell 1 − error / variance by name, None where there is no variance; outputs without a name are left out.

    Args:
        names: M.
        error: (O,) mean squared errors, O ≥ M.
        variance: (O,).
    """
    figures = zip(names, error.tolist(), variance.tolist(), strict=False)
    return {name: 1 - wrong / spread if spread > 1e-5 else None for name, wrong, spread in figures}


def draw_held_out(rollouts: int, share: float, source: torch.Generator) -> Tensor:
    """Choose the rollouts that only choose the epoch: (N,) bool with at least one of each kind."""
    chosen = torch.zeros(rollouts, dtype=torch.bool)
    count = min(max(1, round(share * rollouts)), rollouts - 1)
    chosen[torch.randperm(rollouts, generator=source)[:count]] = True
    return chosen


def _groups(critic: HeadedCritic, settings: DescentSettings) -> list[dict[str, Any]]:
    slow = [parameter for parameter in critic.trunk_parameters() if parameter.requires_grad]
    others = {id(parameter) for parameter in slow}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in critic.parameters() if p.requires_grad and id(p) not in others]}
    ]
    return [*groups, {"params": slow, "lr": settings.learning_rate * settings.trunk_rate}] if slow else groups


def _state(critic: HeadedCritic) -> dict[str, Tensor]:
    """Copy all that a descent may change: a frozen trunk can be too large to be held twice."""
    frozen = {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
    return {name: tensor.detach().clone() for name, tensor in critic.state_dict().items() if name not in frozen}


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
