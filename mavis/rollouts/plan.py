"""The plan of a sampling run: which prompts are sampled under which weights and β."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mavis.policies.chat import Prompt


@dataclass(frozen=True)
class RolloutPlan:
    """The responses to sample, one per row.

    Args:
        prompts: N texts or conversations.
        weights: (N, M) float64.
        betas: (N,) float64, in 1 / reward.

    Examples:
        >>> from mavis.rollouts import RolloutPlan
        >>> plan = RolloutPlan.reference(["Once upon a time", "The dog", "She said"], objectives=2)
        >>> [len(shard.prompts) for shard in plan.shards(2)]
        [2, 1]
    """

    prompts: Sequence[Prompt]
    weights: Tensor
    betas: Tensor

    @classmethod
    def reference(cls, prompts: Sequence[Prompt], objectives: int) -> RolloutPlan:
        """Plan one response of the reference policy per prompt."""
        rows = len(prompts)
        return cls(
            prompts,
            torch.zeros(rows, objectives, dtype=torch.float64),
            torch.zeros(rows, dtype=torch.float64),
        )

    def shards(self, size: int) -> list[RolloutPlan]:
        """Split the plan into shards of at most `size` rows."""
        return [
            RolloutPlan(
                self.prompts[start : start + size], self.weights[start : start + size], self.betas[start : start + size]
            )
            for start in range(0, len(self.prompts), size)
        ]

    def digest(self) -> str:
        """Hash the prompts, weights and β."""
        content = json.dumps([list(self.prompts), self.weights.tolist(), self.betas.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
