"""Alignment vectors: what fine-tuning has added to a model's weights, added to a policy by degrees.

Source: Alignment Vectors, arXiv 2410.19206.
"""

from mavis.vectors.combine import combine
from mavis.vectors.merge import write_merged
from mavis.vectors.named import Vectors
from mavis.vectors.search import CoefficientSearch, search_coefficients
from mavis.vectors.vector import AlignmentVector

__all__ = ["AlignmentVector", "CoefficientSearch", "Vectors", "combine", "search_coefficients", "write_merged"]
