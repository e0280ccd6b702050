"""Preference weights to sweep over."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from mavis.errors import WeightsError


def simplex_grid(objectives: int, divisions: int) -> Tensor:
    """List the preference weights that lie evenly spaced on the simplex.

        { w : w_m = k_m / d,  k_m ∈ {0, ..., d},  Σ_m k_m = d }

    Args:
        objectives: M, the number of objectives, ≥ 1.
        divisions: d, the number of steps from one corner to the next, ≥ 1; 1 gives the corners alone.

    Returns:
        (G, M) float64 weights with G = C(d + M − 1, M − 1); rows sum to one. The first objective's weight
        falls from 1 to 0 down the rows, among equals the second's, and so on, so the last row is the last
        objective alone.

    Raises:
        WeightsError: `objectives` or `divisions` is below 1.

    Source: the simplex lattice of Scheffé (1958); in multi-objective search, Das and Dennis (1998).
    """
    if objectives < 1 or divisions < 1:
        raise WeightsError(
            f"simplex_grid needs objectives and divisions ≥ 1, got {objectives} and {divisions}.",
            "Two objectives in steps of a tenth are simplex_grid(2, 10).",
        )
    # Stars and bars: M − 1 bars among d + M − 1 places, and the stars between two bars are one weight.
    places = divisions + objectives - 1
    counts = [
        [right - left - 1 for left, right in zip((-1, *bars), (*bars, places), strict=True)]
        for bars in combinations(range(places), objectives - 1)
    ]
    return torch.tensor(counts[::-1], dtype=torch.float64) / divisions
