"""How the objectives' values and the KL to come combine into a tilt."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_unit(lam: Tensor) -> Tensor:
    """Compute the unit in which the KL to come is learnt, so that targets have one scale at every strength.

        κ(λ) = |λ|² / (1 + |λ|),   |λ| = Σ_m |λ_m|

    KL grows as |λ|² while the tilt is small, at most as |λ| once it is large, and is 0 at λ = 0.

    Args:
        lam: (..., M), λ = β·w.

    Returns:
        (..., 1), nats.

    Examples:
        >>> import torch
        >>> from mavis.math import kl_unit
        >>> kl_unit(torch.tensor([1.0, -2.0]))
        tensor([2.2500])
    """
    size = lam.abs().sum(-1, keepdim=True)
    return size * (size / (1 + size))  # the square would overflow


def tilt_coefficients(lam: Tensor) -> Tensor:
    """List the factors by which the outputs of a conditioned critic's heads are multiplied.

        tilt = Σ_m λ_m Q_m − K = Σ_m λ_m Q_m − κ(λ) · (K / κ(λ))

    Args:
        lam: (..., M), λ = β·w.

    Returns:
        (..., M + 1): λ, and −κ(λ) for the head that predicts K / κ.

    Examples:
        >>> import torch
        >>> from mavis.math import tilt_coefficients
        >>> tilt_coefficients(torch.tensor([1.0, -2.0]))
        tensor([ 1.0000, -2.0000, -2.2500])
    """
    return torch.cat([lam, -kl_unit(lam)], dim=-1)
