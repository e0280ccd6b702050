"""How the values of the objectives, and the KL still to come, make up a tilt."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_unit(lam: Tensor) -> Tensor:
    """Compute the unit in which the KL still to come is learnt, so that one scale serves all strengths.

        κ(λ) = |λ|² / (1 + |λ|),   |λ| = Σ_m |λ_m|

    KL grows as |λ|² where the tilt is small and no faster than |λ| where it is large, and is 0 at λ = 0.

    Args:
        lam: (..., M), λ = β·w.

    Returns:
        (..., 1), nats.
    """
    size = lam.abs().sum(-1, keepdim=True)
    return size.square() / (1 + size)


def tilt_coefficients(lam: Tensor) -> Tensor:
    """List what the heads of a conditioned critic are multiplied with.

        tilt = Σ_m λ_m Q_m − K = Σ_m λ_m Q_m − κ(λ) · (K / κ(λ))

    Args:
        lam: (..., M), λ = β·w.

    Returns:
        (..., M + 1): λ, and −κ(λ) for the head that predicts K / κ.
    """
    return torch.cat([lam, -kl_unit(lam)], dim=-1)
