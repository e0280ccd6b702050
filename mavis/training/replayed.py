"""Rollouts side by side in memory, as every fit reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics.headed import HeadedCritic
from mavis.rollouts.replay import Sequences

ROWS_PER_PASS = 32
"""How many rollouts one pass of the policy replays."""


@dataclass(frozen=True)
class Replayed:
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

    without_steps: ClassVar[tuple[str, ...]] = ()
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

    def inputs_of(self, critic: HeadedCritic) -> Tensor:
        """Compute what a critic's heads read at every step, (N, T, I) float32."""
        sequences = self.sequences
        return critic.inputs_of_rollouts(sequences.ids, sequences.is_token, self.states)

    def rows(self, index: Tensor) -> Self:
        """Take some rollouts."""
        return type(self)(**{name: tensor[index] for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> Self:
        """Bring them to where they are worked on."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})


Rollouts = TypeVar("Rollouts", bound=Replayed)


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Lay the rollouts of several sets side by side, the shorter ones padded."""
    columns: dict[str, Tensor] = {}
    for name in vars(parts[0]):
        tensors = [getattr(part, name) for part in parts]
        if name not in parts[0].without_steps:
            longest = max(tensor.shape[1] for tensor in tensors)
            before = name in ("prompt_ids", "is_prompt")
            tensors = [_padded(tensor, longest, before) for tensor in tensors]
        columns[name] = torch.cat(tensors)
    return type(parts[0])(**columns)


def _padded(tensor: Tensor, length: int, before: bool) -> Tensor:
    missing = length - tensor.shape[1]
    where = (missing, 0) if before else (0, missing)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + where) if missing else tensor
