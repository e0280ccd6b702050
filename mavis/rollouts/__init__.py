"""Rollouts: sampled responses with their weights, β, per-step KL and rewards."""

from mavis.rollouts.collect import Plan, collect, stored
from mavis.rollouts.prompts import draw_prompts, load_prompts
from mavis.rollouts.sample import RolloutSettings

__all__ = ["Plan", "RolloutSettings", "collect", "draw_prompts", "load_prompts", "stored"]
