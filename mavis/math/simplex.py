"""Grids of preference weights to sweep over."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from mavis.errors import WeightsError, check_whole


def simplex_grid(objectives: int, divisions: int) -> Tensor:
    """List preference weights evenly spaced on the simplex.

        { w : w_m = k_m / d,  k_m ∈ {0, ..., d},  Σ_m k_m = d }

    Args:
        objectives: M, the number of objectives, ≥ 1.
        divisions: d, the number of steps from corner to corner, ≥ 1; 1 gives the corners alone.

    Returns:
        (G, M) float64 weights with G = C(d + M − 1, M − 1); rows sum to one. Rows are in descending
        lexicographic order: the first is the first objective alone, the last the last.

    Raises:
        WeightsError: if `objectives` or `divisions` is not a whole number ≥ 1.

    Source: the simplex lattice of Scheffé (1958); in multi-objective search, Das and Dennis (1998).

    Examples:
        >>> from mavis.math import simplex_grid
        >>> simplex_grid(2, 2).tolist()
        [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    hint = "two objectives in steps of a tenth are simplex_grid(2, 10)."
    check_whole(WeightsError, hint, objectives=objectives, divisions=divisions)
    # Stars and bars: M − 1 bars among d + M − 1 places; the stars between two bars are one objective's weight.
    places = divisions + objectives - 1
    counts = [
        [right - left - 1 for left, right in zip((-1, *bars), (*bars, places), strict=True)]
        for bars in combinations(range(places), objectives - 1)
    ]
    return torch.tensor(counts[::-1], dtype=torch.float64) / divisions
