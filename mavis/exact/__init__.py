"""Small worlds whose optimal policies dynamic programming finds, as yardsticks for what is learnt."""

from mavis.exact.policy import WorldObjective, WorldPolicy, world_tokenizer
from mavis.exact.solve import (
    TiltEvaluation,
    evaluate_tilt,
    normalised_gain,
    optimal_tilt,
    policy_iteration,
    regularised_return,
)
from mavis.exact.world import WORLD_KINDS, World

__all__ = [
    "WORLD_KINDS",
    "TiltEvaluation",
    "World",
    "WorldObjective",
    "WorldPolicy",
    "evaluate_tilt",
    "normalised_gain",
    "optimal_tilt",
    "policy_iteration",
    "regularised_return",
    "world_tokenizer",
]
