"""Reward and KL of best-of-n sampling, from reference rollouts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mavis.errors import EvaluationError


def best_of_n(rewards: Tensor, n: int) -> tuple[float, float]:
    """Compute the reward and KL of drawing n responses and keeping the best.

        p_i = C(i − 1, n − 1) / C(N, n) for the i-th smallest of N rewards, shared evenly among equal ones
        reward = mean_prompts Σ_i p_i r_i,   KL = mean_prompts Σ_i p_i log(N p_i)

    p_i is the probability that response i is the best of n drawn without replacement, so the reward is the exact mean
    over all subsets. Without ties and for large N the KL is log n − (n − 1)/n. Decoding so costs n forward passes per
    token.

    Args:
        rewards: (P, N) rewards w·R of N reference rollouts for each of P prompts; finite, any real dtype.
        n: 1 ≤ n ≤ N.

    Returns:
        Reward in the units of `rewards`, and KL in nats per response.

    Raises:
        EvaluationError: if `rewards` is not a finite, non-empty (P, N), or n is out of range.

    Source: order statistics; the KL without ties is in Beirami et al. (arXiv 2401.01879).

    Examples:
        >>> import torch
        >>> from mavis.math import best_of_n
        >>> reward, kl = best_of_n(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), n=2)  # p = 0, 1/6, 2/6, 3/6
        >>> round(reward, 3), round(kl, 3)
        (2.333, 0.375)
    """
    if rewards.ndim != 2 or rewards.numel() == 0 or not bool(torch.isfinite(rewards).all()):
        raise EvaluationError(
            f"rewards must be a finite, non-empty (prompts, rollouts) tensor, got shape {tuple(rewards.shape)}.",
            "weight the objectives first, and draw the same number of reference rollouts for every prompt.",
        )
    rollouts = rewards.shape[1]
    if not 1 <= n <= rollouts:
        raise EvaluationError(
            f"n is {n}, expected 1 ≤ n ≤ {rollouts}, the rollouts per prompt.",
            "n = 16 costs 16 times the forward passes.",
        )
    ordered = rewards.double().sort(dim=1).values
    # log C(i − 1, n − 1) − log C(N, n); for i < n there is no subset in which i is the best.
    rank = torch.arange(1, rollouts + 1, dtype=torch.float64, device=rewards.device)
    log_subsets = torch.lgamma(rank) - torch.lgamma((rank - n + 1).clamp_min(1))
    log_all = torch.lgamma(rank[-1] + 1) - torch.lgamma(rank[-1] - n + 1) - torch.log(rank.new_tensor(n))
    probs = torch.where(rank >= n, (log_subsets - log_all).exp(), 0.0)
    reward = kl = 0.0
    for row in ordered:
        values, group, size = row.unique(return_inverse=True, return_counts=True)
        shared = torch.zeros_like(values).index_add_(0, group, probs)
        reward += float((shared * values).sum())
        kl += float(torch.xlogy(shared, shared * rollouts / size).sum())
    return reward / len(ordered), kl / len(ordered)
