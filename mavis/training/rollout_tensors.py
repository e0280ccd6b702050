"""Rollouts side by side in memory, as every fit reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup
from mavis.errors import ConfigError
from mavis.rollouts.replay import Sequences


@dataclass(frozen=True)
class RolloutTensors:
    """N rollouts: what a critic's heads read of them.

    Args:
        prompt_ids: (N, P) integer, padded on the left.
        is_prompt: (N, P) bool, False on padding.
        states: (N, T, H), in the policy's dtype, on the CPU; H is 0 for a critic that does not read them.
        action_ids: (N, T) integer.
        is_response: (N, T) bool.
    """

    prompt_ids: Tensor
    is_prompt: Tensor
    states: Tensor
    action_ids: Tensor
    is_response: Tensor

    per_sequence: ClassVar[tuple[str, ...]] = ()
    """The tensors that have no dimension of steps."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def sequences(self) -> Sequences:
        """Prompts and responses as one."""
        return Sequences(
            ids=torch.cat([self.prompt_ids, self.action_ids], dim=1),
            is_token=torch.cat([self.is_prompt, self.is_response], dim=1),
            is_response=self.is_response,
        )

    def inputs_of(self, critic: HeadCritic) -> Tensor:
        """Compute what a critic's heads read at every step, (N, T, I) float32."""
        sequences = self.sequences
        return critic.inputs_of_rollouts(sequences.ids, sequences.is_token, self.states)

    def rows(self, index: Tensor) -> Self:
        """Take some rollouts."""
        return type(self)(**{name: tensor[index] for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> Self:
        """Bring them to where they are worked on."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})


Rollouts = TypeVar("Rollouts", bound=RolloutTensors)


def concatenate_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Lay the rollouts of several sets side by side, the shorter ones padded."""
    columns: dict[str, Tensor] = {}
    for name in vars(parts[0]):
        tensors = [getattr(part, name) for part in parts]
        if name not in parts[0].per_sequence:
            longest = max(tensor.shape[1] for tensor in tensors)
            before = name in ("prompt_ids", "is_prompt")
            tensors = [_padded(tensor, longest, before) for tensor in tensors]
        columns[name] = torch.cat(tensors)
    return type(parts[0])(**columns)


@dataclass(frozen=True)
class ShardedRollouts(Generic[Rollouts]):
    """A set of rollouts that lie spread over the processes, each in one of them.

    Args:
        held: the n that this process holds, n ≥ 1.
        places: (n,) integer, their places among all.
        total: N, how many there are in all processes together.
        processes: that hold them.
    """

    local_rollouts: Rollouts
    local_indices: Tensor
    total: int
    processes: ProcessGroup

    @classmethod
    def shard(cls, rollouts: Rollouts, processes: ProcessGroup) -> Self:
        """Share out rollouts that every process has all of."""
        local_indices = shard_indices(len(rollouts), processes)
        return cls(
            rollouts.rows(local_indices) if processes.world_size > 1 else rollouts,
            local_indices,
            len(rollouts),
            processes,
        )

    def __len__(self) -> int:
        return self.total

    def rows(self, index: Tensor) -> Rollouts:
        """Take those of some rollouts that lie here, at least one row.

        Where none does there is a row that counts for nothing, for all processes go through a network together.

        Args:
            index: (n,) integer, places among all.
        """
        if self.processes.world_size == 1:
            return self.local_rollouts.rows(index)
        local = self._where[index]
        local = local[local >= 0]
        if len(local):
            return self.local_rollouts.rows(local)
        idle = self.local_rollouts.rows(torch.zeros(1, dtype=torch.long))
        return replace(idle, is_response=torch.zeros_like(idle.is_response))

    def all_gather(self, values: Tensor) -> Tensor:
        """Bring together what every process knows of the rollouts that it holds, in their order.

        Args:
            values: (n, ...), of the rollouts held here.

        Returns:
            (N, ...), the same in every process.
        """
        whole = values.new_zeros(self.total, *values.shape[1:])
        whole[self.local_indices] = values
        return self.processes.all_reduce_sum(whole)

    @cached_property
    def _where(self) -> Tensor:
        """(N,) integer, where a rollout lies here, −1 for those of other processes."""
        where = torch.full((self.total,), -1)
        where[self.local_indices] = torch.arange(len(self.local_indices))
        return where


def shard_indices(rollouts: int, processes: ProcessGroup) -> Tensor:
    """Say which of some rollouts this process is to hold: every `count`-th, (n,) integer.

    Raises:
        ConfigError: if there are fewer rollouts than processes.
    """
    if rollouts < processes.world_size:
        raise ConfigError(
            f"there are {rollouts} rollouts for {processes.world_size} processes.",
            "sample more, or start fewer processes.",
        )
    return torch.arange(processes.rank, rollouts, processes.world_size)


def concatenate_sharded(parts: Sequence[ShardedRollouts[Rollouts]]) -> ShardedRollouts[Rollouts]:
    """Make one set of several that are spread over the same processes, one after the other."""
    before = torch.tensor([0, *(part.total for part in parts)]).cumsum(0)
    return ShardedRollouts(
        local_rollouts=concatenate_rollouts([part.local_rollouts for part in parts]),
        local_indices=torch.cat([part.local_indices + start for part, start in zip(parts, before[:-1], strict=True)]),
        total=int(before[-1]),
        processes=parts[0].processes,
    )


def _padded(tensor: Tensor, length: int, before: bool) -> Tensor:
    missing = length - tensor.shape[1]
    where = (missing, 0) if before else (0, missing)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + where) if missing else tensor
