"""Pure tensor functions: the formulas of the project, in torch only."""

from mavis.math.best_of_n import best_of_n
from mavis.math.bradley_terry import bradley_terry_loss, information_gain, map_weights, posterior_draws
from mavis.math.frontier import (
    OptimalFrontier,
    frontier_efficiency,
    optimal_frontier,
    optimal_reward_at,
    reward_at,
)
from mavis.math.kl import step_kl
from mavis.math.mixture import kl_unit, tilt_coefficients
from mavis.math.position_hash import position_multipliers
from mavis.math.returns import reverse_cumsum_exclusive, soft_returns, whole_response_returns
from mavis.math.simplex import simplex_grid
from mavis.math.tilt import tilted_logprobs, top_candidates

__all__ = [
    "OptimalFrontier",
    "best_of_n",
    "bradley_terry_loss",
    "frontier_efficiency",
    "information_gain",
    "kl_unit",
    "map_weights",
    "optimal_frontier",
    "optimal_reward_at",
    "position_multipliers",
    "posterior_draws",
    "reverse_cumsum_exclusive",
    "reward_at",
    "simplex_grid",
    "soft_returns",
    "step_kl",
    "tilt_coefficients",
    "tilted_logprobs",
    "top_candidates",
    "whole_response_returns",
]
