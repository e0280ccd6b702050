"""Rollouts: sampled responses with their weights, β, per-step KL and rewards."""

from mavis.rollouts.collect import Plan, collect, stored
from mavis.rollouts.prompts import draw_prompts, load_prompts
from mavis.rollouts.sample import RolloutSettings
from mavis.rollouts.sampler import Drawn, Sampler

__all__ = ["Drawn", "Plan", "RolloutSettings", "Sampler", "collect", "draw_prompts", "load_prompts", "stored"]
