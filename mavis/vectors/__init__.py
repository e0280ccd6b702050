"""Alignment vectors: weight differences from fine-tuning, added to a policy with any coefficient.

Source: Alignment Vectors, arXiv 2410.19206.
"""

from mavis.vectors.coefficient_search import CoefficientSearch, search_coefficients
from mavis.vectors.combine import combine
from mavis.vectors.merge import write_merged
from mavis.vectors.vector import AlignmentVector
from mavis.vectors.vector_set import Vectors

__all__ = ["AlignmentVector", "CoefficientSearch", "Vectors", "combine", "search_coefficients", "write_merged"]
