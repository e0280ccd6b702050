"""Prompts, conversations and preference pairs from lists, files, saved datasets and the hub."""

from mavis.data.pairs import Pair, load_pairs
from mavis.data.prompts import draw_prompts, load_prompts

__all__ = ["Pair", "draw_prompts", "load_pairs", "load_prompts"]
