"""Decoding: the tilt as a logits processor, and the one-line façade."""

from mavis.decoding.facade import generate
from mavis.decoding.processor import MavisTilt

__all__ = ["MavisTilt", "generate"]
