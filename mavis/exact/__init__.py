"""Small worlds whose optimal policies dynamic programming finds, as yardsticks for everything that is learnt."""

from mavis.exact.policy import WorldObjective, WorldPolicy, world_tokenizer
from mavis.exact.solve import Evaluation, evaluate_tilt, goal, iterate, optimum, share
from mavis.exact.world import KINDS, World

__all__ = [
    "KINDS",
    "Evaluation",
    "World",
    "WorldObjective",
    "WorldPolicy",
    "evaluate_tilt",
    "goal",
    "iterate",
    "optimum",
    "share",
    "world_tokenizer",
]
