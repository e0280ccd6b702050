"""Decoding: the tilt as a logits processor, and the one-line façades."""

from mavis.decoding.generation import generate
from mavis.decoding.logits_processor import MavisTilt
from mavis.decoding.respond import Response, respond

__all__ = ["MavisTilt", "Response", "generate", "respond"]
