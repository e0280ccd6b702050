"""Rollouts: sampled responses with their weights, β, per-step KL and rewards."""

from mavis.rollouts.collect import Plan, RolloutSettings, collect, stored
from mavis.rollouts.prompts import load_prompts

__all__ = ["Plan", "RolloutSettings", "collect", "load_prompts", "stored"]
