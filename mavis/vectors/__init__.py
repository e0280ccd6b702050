"""Alignment vectors: what fine-tuning has added to a model's weights, added to a policy by degrees.

Source: Alignment Vectors, arXiv 2410.19206.
"""

from mavis.vectors.coefficient_search import CoefficientSearch, search_coefficients
from mavis.vectors.combine import combine
from mavis.vectors.merge import write_merged
from mavis.vectors.vector import AlignmentVector
from mavis.vectors.vector_set import Vectors

__all__ = ["AlignmentVector", "CoefficientSearch", "Vectors", "combine", "search_coefficients", "write_merged"]
