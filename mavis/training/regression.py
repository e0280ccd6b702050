"""Fitting heads by minimising a squared error over rollouts, keeping the epoch with the smallest held-out error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup
from mavis.errors import ConfigError, TrainingError, check_number, check_whole
from mavis.training.accelerate_session import GRADIENT_NORM, accelerator, modifies_modules, trained_state
from mavis.training.rollout_tensors import Rollouts, ShardedRollouts


@dataclass(frozen=True)
class RegressionSettings:
    """The settings of a fit of heads.

    Args:
        epochs: passes over the rollouts, ≥ 1; the one with the smallest held-out error is kept.
        batch_size: rollouts per step, of all processes together, ≥ 1.
        learning_rate: peak learning rate; a linear warm-up over a tenth of the steps, then a cosine decay to 0.
        trunk_rate: factor on the learning rate for the trunk of a value model, > 0.
        weight_decay: of AdamW.
        held_out: share of the rollouts that only choose the epoch, 0 < share < 1.

    Raises:
        ConfigError: if a setting is out of range.

    Examples:
        >>> from mavis.training import RegressionSettings
        >>> RegressionSettings(epochs=2).batch_size
        32
    """

    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 3e-3
    trunk_rate: float = 0.1
    weight_decay: float = 1e-2
    held_out: float = 0.1

    def __post_init__(self) -> None:
        check_whole(ConfigError, "the defaults are 6 and 32.", epochs=self.epochs, batch_size=self.batch_size)
        check_number(ConfigError, "the default is 0.1.", held_out=self.held_out)
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}, expected 0 < held_out < 1.", "the default is 0.1.")
        rates = {"learning_rate": self.learning_rate, "trunk_rate": self.trunk_rate}
        check_number(ConfigError, "the defaults are 3e-3 and 0.1.", low=0, strict=True, **rates)
        check_number(ConfigError, "the default is 1e-2.", low=0, weight_decay=self.weight_decay)


def fit_regression(
    critic: HeadCritic,
    network: nn.Module,
    rollouts: ShardedRollouts[Any],
    settings: RegressionSettings,
    *,
    held_out: Tensor,
    order: torch.Generator,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[int, list[float]]:
    """Minimise a squared error over the parameters of a critic, in place.

        L(batch) = Σ_r Σ_{i on r} squared_i / Σ_r Σ_{i on r} weight_i

    where r are the processes: each computes the part of a batch that it holds, and the gradient is that of the whole
    batch however unevenly it is distributed, as in a single process.

    Args:
        critic: the initial critic and the result: as after the epoch with the smallest held-out error. The caller
            refreshes its token table.
        network: contains the critic; maps a batch to weighted squared errors and their weights, (B, T, O) each.
        rollouts: to learn from.
        settings: of the fit.
        held_out: (N,) bool, the rollouts that only choose the epoch.
        order: source of the rollouts' random order.
        on_epoch: called with each epoch's number and held-out error.

    Returns:
        The epoch that is kept, counted from 1, or 0 if none was better than the initial critic; and the held-out error
        before the first epoch and after each.

    Raises:
        TrainingError: if an error is not finite; the critic is left as it was at that point.
    """
    device, watched, training = _device(critic), held_out.nonzero()[:, 0], (~held_out).nonzero()[:, 0]
    batches = math.ceil(len(training) / settings.batch_size)
    with accelerator(device) as accelerate, rollouts.processes.collective():
        learner, network = _twin(critic, network) if modifies_modules(accelerate) else (critic, network)
        optimiser = torch.optim.AdamW(
            _groups(learner, settings), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        network, optimiser = accelerate.prepare(network, optimiser)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(settings.epochs * batches))

        def watch() -> float:
            learner.eval()
            return mean_error(network, rollouts, watched, settings.batch_size, device).mean().item()

        losses = [watch()]
        best, best_state = 0, trained_state(accelerate, learner)
        for epoch in range(1, settings.epochs + 1):
            learner.train()
            for index in training[torch.randperm(len(training), generator=order)].split(settings.batch_size):
                squared, weight = network(rollouts.rows(index).to(device))
                optimiser.zero_grad()
                accelerate.backward(_share(squared, weight, rollouts.processes))
                accelerate.clip_grad_norm_(network.parameters(), GRADIENT_NORM)
                optimiser.step()
                schedule.step()
            losses.append(watch())
            if not math.isfinite(losses[0] + losses[-1]):
                raise TrainingError(
                    f"the held-out error was {losses[0]} before the fit and is {losses[-1]} after epoch {epoch}.",
                    "lower the learning rate; if it was not finite before the fit, look for NaN in the rollouts.",
                )
            if losses[-1] < losses[best]:
                best, best_state = epoch, trained_state(accelerate, learner)
            if on_epoch is not None:
                on_epoch(epoch, losses[-1])
    critic.load_state_dict(critic.state_dict() | best_state)
    return best, losses


def _share(squared: Tensor, weight: Tensor, processes: ProcessGroup) -> Tensor:
    """Compute this process's part of the mean error of a batch, times the number of processes.

    Gradients are averaged over the processes, while that of the mean error is the sum of the parts.
    """
    whole = processes.all_reduce_sum(weight.detach().sum())
    return processes.world_size * squared.sum() / whole.clamp_min(1)


@torch.no_grad()
def mean_error(
    network: nn.Module, rollouts: ShardedRollouts[Any], index: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Compute the mean squared error of each output over some rollouts of all processes, (O,).

    Args:
        network: see `fit_regression`.
        rollouts: of all processes.
        index: (n,) integer, which of them.
        batch_size: rollouts at once.
        device: of the network.
    """
    squared, weights = sums_over(rollouts, index, batch_size, device, lambda batch: network(batch))
    return squared / weights.clamp_min(1e-6)


def sums_over(
    rollouts: ShardedRollouts[Rollouts],
    index: Tensor,
    batch_size: int,
    device: torch.device,
    terms: Callable[[Rollouts], Sequence[Tensor]],
) -> Tensor:
    """Sum terms of every step of some rollouts over all processes.

    Args:
        rollouts: of all processes.
        index: (n,) integer, which of them.
        batch_size: rollouts per pass.
        device: to compute on.
        terms: maps a batch to F terms of every step, (B, T, O) each, 0 on padding.

    Returns:
        (F, O), the same in every process.
    """
    sums = torch.zeros((), device=device)
    for some in index.split(batch_size):
        summands = terms(rollouts.rows(some).to(device))
        sums = sums + torch.stack([summand.sum((0, 1)) for summand in summands])
    return rollouts.processes.all_reduce_sum(sums)


def explained_share(names: Sequence[str], error: Tensor, variance: Tensor) -> dict[str, float | None]:
    """Compute 1 − error / variance by name, None where there is no variance; unnamed outputs are left out.

    Args:
        names: M.
        error: (O,) mean squared errors, O ≥ M.
        variance: (O,).
    """
    moments = zip(names, error.tolist(), variance.tolist(), strict=False)
    return {name: 1 - wrong / spread if spread > 1e-5 else None for name, wrong, spread in moments}


def draw_held_out(rollouts: int, share: float, source: torch.Generator) -> Tensor:
    """Draw the held-out rollouts: (N,) bool, at least one True and one False."""
    chosen = torch.zeros(rollouts, dtype=torch.bool)
    count = min(max(1, round(share * rollouts)), rollouts - 1)
    chosen[torch.randperm(rollouts, generator=source)[:count]] = True
    return chosen


def _groups(critic: HeadCritic, settings: RegressionSettings) -> list[dict[str, Any]]:
    slow = [parameter for parameter in critic.trunk_parameters() if parameter.requires_grad]
    others = {id(parameter) for parameter in slow}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in critic.parameters() if p.requires_grad and id(p) not in others]}
    ]
    return [*groups, {"params": slow, "lr": settings.learning_rate * settings.trunk_rate}] if slow else groups


def _device(critic: HeadCritic) -> torch.device:
    return critic.reward_mean.device


def _twin(critic: HeadCritic, network: nn.Module) -> tuple[HeadCritic, nn.Module]:
    """Copy a network, with the critic inside it, that Accelerate will modify irreversibly."""
    twin = copy.deepcopy(network)
    for weight in twin.parameters():  # FSDP 2 asks for the usual layout, see `PrefixReader`
        weight.data = weight.data.contiguous()
    names = [name for name, module in network.named_modules() if module is critic]
    learner: Any = twin.get_submodule(names[0])
    # Accelerate asks the network which modules to keep whole, but only a value model's trunk knows.
    twin._no_split_modules = getattr(getattr(critic, "trunk", None), "_no_split_modules", None)  # type: ignore[assignment]
    return learner, twin


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor
