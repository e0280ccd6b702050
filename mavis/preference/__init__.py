"""Preference weights from a user's choices between pairs of responses, and the most informative pair to ask next."""

from mavis.preference.infer import InferredWeights, infer_weights, next_pair
from mavis.preference.pairs import Pair, read_pairs, reward_differences
from mavis.preference.pool import CandidatePairs, candidate_pairs

__all__ = [
    "CandidatePairs",
    "InferredWeights",
    "Pair",
    "candidate_pairs",
    "infer_weights",
    "next_pair",
    "read_pairs",
    "reward_differences",
]
