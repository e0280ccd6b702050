"""The exact KL divergence of one decoding step to the reference policy."""

from __future__ import annotations

import torch
from torch import Tensor


def step_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Compute the KL divergence of one step's distribution to the reference.

        KL(π ‖ π_ref) = Σ_{a: π(a) > 0} π(a) · (log π(a) − log π_ref(a))

    Args:
        logprobs: (..., K), log π of the candidates; −inf means probability 0 and contributes 0.
        reference_logprobs: (..., K), log π_ref of the same candidates, normalised over the *whole* vocabulary, so
            that leaving tokens out of the candidates costs KL.

    Returns:
        (...,), in nats, ≥ 0.

    Examples:
        >>> import torch
        >>> from mavis.math import step_kl
        >>> step_kl(torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.1308)
    """
    difference = torch.where(logprobs == -torch.inf, 0.0, logprobs - reference_logprobs)
    # Rounding can give −1e-8 where the two distributions agree; a divergence is never negative.
    return (logprobs.exp() * difference).sum(-1).clamp_min(0.0)
