"""Pseudo-random multipliers by position, for hashing token sequences."""

from __future__ import annotations

from torch import Tensor


def position_multipliers(positions: Tensor) -> Tensor:
    """Map every position to a fixed pseudo-random odd number > 0.

    Args:
        positions: int64, any shape.

    Returns:
        int64 of the same shape, all odd.

    Source: SplitMix64, Steele et al. (OOPSLA 2014), with torch's arithmetic right shifts, which clear the sign.

    Examples:
        >>> import torch
        >>> from mavis.math import position_multipliers
        >>> multipliers = position_multipliers(torch.arange(3))
        >>> (multipliers % 2).tolist(), len(set(multipliers.tolist()))
        ([1, 1, 1], 3)
    """
    mixed = (positions + 2) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)) | 1
