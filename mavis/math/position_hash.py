"""A pseudo-random odd multiplier for every position, to hash token sequences with."""

from __future__ import annotations

from torch import Tensor


def position_multipliers(positions: Tensor) -> Tensor:
    """Give every position a number that looks random, by the steps of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mixed = (positions + 2) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)) | 1
