"""What the fit reads: the replayed steps of all rollouts, side by side in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics import HiddenStateCritic
from mavis.rollouts.collect import RolloutSettings
from mavis.rollouts.replay import Sequences, replay

_ROWS_PER_PASS = 32


@dataclass(frozen=True)
class Features:
    """N replayed rollouts.

    Args:
        states: (N, T, H), in the policy's dtype, on the CPU.
        action_ids: (N, T) integer.
        expected: (N, T, E) float32, E_{a∼π}[e_a] under the policy that is being evaluated.
        kl: (N, T) float32, KL of that policy to the reference in nats, 0 after the end.
        is_response: (N, T) bool.
        rewards: (N, M) float32, normalised.
        lam: (N, M) float32, the λ of the policy that is being evaluated, which a conditioned critic reads.
        counts_for: (N, M) bool, True where that policy is the one whose value of objective m is asked for.
    """

    states: Tensor
    action_ids: Tensor
    expected: Tensor
    kl: Tensor
    is_response: Tensor
    rewards: Tensor
    lam: Tensor
    counts_for: Tensor

    def __len__(self) -> int:
        return len(self.rewards)

    def rows(self, index: Tensor) -> Features:
        """Take some rollouts."""
        return Features(**{name: tensor[index] for name, tensor in vars(self).items()})


def extract(
    policy: Any,
    shards: Iterable[Any],
    embeddings: Tensor,
    critic: HiddenStateCritic,
    settings: RolloutSettings,
    *,
    tilted: bool,
) -> Features:
    """Replay shards of rollouts, under the policy that their λ names.

    Args:
        policy: the reference policy.
        shards: from `collect`.
        embeddings: (V, E) float32, the e_a of `token_embeddings`.
        critic: gives the normalisation and, where `tilted`, the policy that sampled.
        settings: that the rollouts were sampled with.
        tilted: whether the policy to be evaluated is the one that the critic, as it is now, tilts; else it is the
            reference policy. Any other may have sampled the rollouts.

    Returns:
        The features of all rollouts that have at least one response token.
    """
    parts: list[Features] = []
    for shard in shards:
        shard = shard.select([i for i, ids in enumerate(shard["response_ids"]) if ids])
        for at in range(0, len(shard), _ROWS_PER_PASS):
            rows = shard[at : at + _ROWS_PER_PASS]
            weights = torch.tensor(rows["weights"], dtype=torch.float64)
            lam = torch.tensor(rows["beta"], dtype=torch.float64)[:, None] * weights
            steps = replay(
                policy,
                Sequences.pack(rows["prompt_ids"], rows["response_ids"]),
                embeddings,
                critic=critic if tilted else None,
                lam=lam.float(),
                top_k=settings.top_k,
                temperature=settings.temperature,
            )
            parts.append(
                Features(
                    states=steps.states.cpu(),
                    action_ids=steps.action_ids.cpu(),
                    expected=steps.expected.cpu(),
                    kl=steps.kl.cpu(),
                    is_response=steps.is_response.cpu(),
                    rewards=critic.normalise(torch.tensor(rows["rewards"], dtype=torch.float64)).float(),
                    lam=lam.float(),
                    counts_for=weights != 0
                    if tilted and not critic.conditioned
                    else torch.ones_like(weights, dtype=torch.bool),
                )
            )
    return joined(parts)


def joined(parts: Sequence[Features]) -> Features:
    """Lay the rollouts of several sets side by side, the shorter ones padded."""
    longest = max(part.kl.shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        missing = longest - tensor.shape[1]
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)) if missing else tensor

    per_step = ("states", "action_ids", "expected", "kl", "is_response")
    return Features(
        **{name: torch.cat([padded(getattr(part, name)) for part in parts]) for name in per_step},
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("rewards", "lam", "counts_for")},
    )
