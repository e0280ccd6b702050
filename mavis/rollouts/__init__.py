"""Rollouts: sampled responses with their weights, β, per-step KL and rewards."""

from mavis.data import draw_prompts, load_prompts
from mavis.rollouts.collect import collect, load_shards
from mavis.rollouts.plan import RolloutPlan
from mavis.rollouts.sampler import SampledResponses, Sampler
from mavis.rollouts.sampling import RolloutSettings

__all__ = [
    "RolloutPlan",
    "RolloutSettings",
    "SampledResponses",
    "Sampler",
    "collect",
    "draw_prompts",
    "load_prompts",
    "load_shards",
]
