"""Objectives: score responses by a reward model, by their words, or by any callable."""

from mavis.rewards.batch_check import check_batch_independence
from mavis.rewards.identity import objective_identity
from mavis.rewards.lexical import Brevity, Dialogue, Positive, Readability, exclamations
from mavis.rewards.protocol import Objective, Signed, score
from mavis.rewards.reward_model import RewardModel

__all__ = [
    "Brevity",
    "Dialogue",
    "Objective",
    "Positive",
    "Readability",
    "RewardModel",
    "Signed",
    "check_batch_independence",
    "exclamations",
    "objective_identity",
    "score",
]
