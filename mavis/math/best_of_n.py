"""What the best of n responses earns and how far it is from the reference policy, from reference rollouts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mavis.errors import EvaluationError


def best_of_n(rewards: Tensor, n: int) -> tuple[float, float]:
    """Compute reward and KL of drawing n responses and keeping the best, at n times the forward passes.

        p_i = C(i − 1, n − 1) / C(N, n) for the i-th smallest of N rewards, shared evenly among equal ones
        reward = mean_prompts Σ_i p_i r_i,   KL = mean_prompts Σ_i p_i log(N p_i)

    p_i is the chance that response i is the best of n that are drawn without replacement, so the reward is the mean
    over all subsets at once. Without ties and for large N the KL is log n − (n − 1)/n.

    Args:
        rewards: (P, N) rewards w·R of N reference rollouts for each of P prompts; finite, any real dtype.
        n: 1 ≤ n ≤ N.

    Returns:
        Reward in the units of `rewards`, and KL in nats per response.

    Raises:
        EvaluationError: `rewards` is not a finite, non-empty (P, N), or n is out of range.

    Source: order statistics; the KL without ties is in Beirami et al. (arXiv 2401.01879).
    """
    if rewards.ndim != 2 or rewards.numel() == 0 or not bool(torch.isfinite(rewards).all()):
        raise EvaluationError(
            f"rewards must be a finite, non-empty (prompts, rollouts) tensor, got shape {tuple(rewards.shape)}.",
            "Weigh the objectives first, and draw the same number of reference rollouts for every prompt.",
        )
    rollouts = rewards.shape[1]
    if not 1 <= n <= rollouts:
        raise EvaluationError(f"n is {n}, expected 1 ≤ n ≤ {rollouts}, the rollouts per prompt.", "16 costs 16 times.")
    ordered = rewards.double().sort(dim=1).values
    # log C(i − 1, n − 1) − log C(N, n); for i < n there is no subset in which i is the best.
    place = torch.arange(1, rollouts + 1, dtype=torch.float64, device=rewards.device)
    ways = torch.lgamma(place) - torch.lgamma((place - n + 1).clamp_min(1))
    logs = ways - torch.lgamma(place[-1] + 1) + torch.lgamma(place[-1] - n + 1) + torch.log(place.new_tensor(n))
    alone = torch.where(place >= n, logs.exp(), 0.0)
    reward = kl = 0.0
    for row in ordered:
        values, which, copies = row.unique(return_inverse=True, return_counts=True)
        shared = torch.zeros_like(values).index_add_(0, which, alone)
        reward += float((shared * values).sum())
        kl += float(torch.xlogy(shared, shared * rollouts / copies).sum())
    return reward / len(ordered), kl / len(ordered)
