"""EMR-merging: one unified vector, with a mask and a scale per task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mavis.vectors.vector import AlignmentVector, changed_names, lazy_vector


def elect(differences: Sequence[Tensor]) -> Tensor:
    """Elect the sign and the magnitude of every element of the unified vector.

        γ = sgn(Σ_i Δ_i),   τ = γ ⊙ max { |Δ_i| : sgn(Δ_i) = γ }

    Args:
        differences: Δ_i, one per task, of one shape, float32.

    Returns:
        τ, of that shape.

    Source: EMR-merging, Huang et al. (NeurIPS 2024), equation 3.
    """
    total = torch.zeros_like(differences[0])
    for difference in differences:
        total += difference
    sign = total.sign_()
    size = torch.zeros_like(sign)
    for difference in differences:
        size = torch.maximum(size, (difference * sign).clamp_(min=0))
    return sign * size


def emr(vectors: Sequence[AlignmentVector], coefficients: Sequence[float]) -> AlignmentVector:
    """Elect one unified vector for all tasks, then mask and rescale it for each.

        M_i = [Δ_i ⊙ τ > 0],   λ_i = Σ|Δ_i| / Σ|M_i ⊙ τ|,   Δ = Σ_i c_i λ_i M_i ⊙ τ

    With coefficient 1 for one task and 0 for the others this is the paper's model for that task. Both sums
    of a rescaler λ_i run over all elements of all tensors, so it is a ratio of sums, not a mean of ratios per tensor.

    Args:
        vectors: one per task; all of them vote on τ.
        coefficients: c_i, finite.

    Returns:
        The combination. The scales λ_i are computed immediately, the rest on access.

    Source: EMR-merging, Huang et al. (NeurIPS 2024).
    """
    names = changed_names(vectors)
    active = [i for i, coefficient in enumerate(coefficients) if coefficient]
    sizes, masked_sizes = [0.0] * len(vectors), [0.0] * len(vectors)

    def parts(name: str) -> tuple[dict[int, Tensor], Tensor]:
        tensors = {i: vector.tensors[name] for i, vector in enumerate(vectors) if name in vector.tensors}
        return tensors, elect(list(tensors.values()))

    for name in names:
        tensors, unified = parts(name)
        for i in active:
            if i in tensors:
                sizes[i] += float(tensors[i].double().abs().sum())
                masked_sizes[i] += float(unified[tensors[i] * unified > 0].double().abs().sum())
    scales = [size / masked if masked else 0.0 for size, masked in zip(sizes, masked_sizes, strict=True)]

    def merged(name: str) -> Tensor:
        tensors, unified = parts(name)
        result = torch.zeros_like(unified)
        for i in active:
            if i in tensors:
                result += coefficients[i] * scales[i] * (unified * (tensors[i] * unified > 0))
        return result

    return lazy_vector(vectors, names, merged)
