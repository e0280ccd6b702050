"""Rollouts as tensors, in one process or sharded over several."""

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
    """N rollouts as tensors: what a critic's heads read.

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
    """The tensors without a dimension of steps."""

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def sequences(self) -> Sequences:
        """Prompts and responses, concatenated."""
        return Sequences(
            ids=torch.cat([self.prompt_ids, self.action_ids], dim=1),
            is_token=torch.cat([self.is_prompt, self.is_response], dim=1),
            is_response=self.is_response,
        )

    def inputs_of(self, critic: HeadCritic) -> Tensor:
        """Compute the inputs of a critic's heads at every step, (N, T, I) float32."""
        sequences = self.sequences
        return critic.rollout_inputs(sequences.ids, sequences.is_token, self.states)

    def rows(self, index: Tensor) -> Self:
        """Select rollouts by index."""
        return type(self)(**{name: tensor[index] for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> Self:
        """Copy all tensors to a device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})


Rollouts = TypeVar("Rollouts", bound=RolloutTensors)


def concatenate_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenate several sets of rollouts, padding to the longest."""
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
    """N rollouts sharded over the processes of a group, each of them in one process.

    Args:
        local_rollouts: the n ≥ 1 rollouts of this process.
        local_indices: (n,) integer, their indices among all N.
        total: N.
        processes: the group.
    """

    local_rollouts: Rollouts
    local_indices: Tensor
    total: int
    processes: ProcessGroup

    @classmethod
    def shard(cls, rollouts: Rollouts, processes: ProcessGroup) -> Self:
        """Shard rollouts that every process has in full."""
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
        """Select those of some rollouts that are in this process, at least one row.

        Where none is, the row has no response token: all processes have to call a network together.

        Args:
            index: (n,) integer, indices among all N.
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
        """Gather values of all rollouts, in order, from the processes that hold them.

        Args:
            values: (n, ...), of the local rollouts.

        Returns:
            (N, ...), the same in every process.
        """
        whole = values.new_zeros(self.total, *values.shape[1:])
        whole[self.local_indices] = values
        return self.processes.all_reduce_sum(whole)

    @cached_property
    def _where(self) -> Tensor:
        """(N,) integer, the local index of each rollout, −1 for those of other processes."""
        where = torch.full((self.total,), -1)
        where[self.local_indices] = torch.arange(len(self.local_indices))
        return where


def shard_indices(rollouts: int, processes: ProcessGroup) -> Tensor:
    """Return the indices of the rollouts that this process holds: every `world_size`-th, (n,) integer.

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
    """Concatenate several sets that are sharded over the same processes."""
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
