"""Decoding: the tilt as a logits processor, and the one-line façade."""

from mavis.decoding.generation import generate
from mavis.decoding.logits_processor import MavisTilt

__all__ = ["MavisTilt", "generate"]
