"""Exact KL divergence of one step to the reference policy."""

from __future__ import annotations

import torch
from torch import Tensor


def step_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Measure how far one step's distribution is from the reference.

        KL(π ‖ π_ref) = Σ_{a: π(a) > 0} π(a) · (log π(a) − log π_ref(a))

    Args:
        logprobs: (..., K), log π of the candidates; −inf means probability 0 and contributes 0.
        reference_logprobs: (..., K), log π_ref of the same candidates, normalised over the *whole* vocabulary, so
            that leaving tokens out of the candidates costs KL.

    Returns:
        (...,), in nats, ≥ 0.
    """
    difference = torch.where(logprobs == -torch.inf, 0.0, logprobs - reference_logprobs)
    # Rounding can leave −1e-8 where the two distributions agree; a divergence is never negative.
    return (logprobs.exp() * difference).sum(-1).clamp_min(0.0)
