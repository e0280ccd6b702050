"""Combination of several alignment vectors into one, by several methods."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from mavis.errors import VectorError, closest, import_optional
from mavis.vectors.emr import emr
from mavis.vectors.vector import AlignmentVector, changed_names, finite, lazy_vector, weighted_sum

Method = Literal["linear", "emr", "ties", "dare", "dare_ties", "magnitude_prune"]
"""How vectors are combined."""

_PEFT_FUNCTIONS = {
    "ties": "ties",
    "dare": "dare_linear",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude_prune",
}


def combine(
    vectors: Mapping[str, AlignmentVector],
    coefficients: Mapping[str, float],
    method: Method = "linear",
    density: float | None = None,
    seed: int = 0,
) -> AlignmentVector:
    """Combine named vectors with coefficients.

        linear:           Δ = Σ_i c_i Δ_i
        emr:              Δ = Σ_i c_i λ_i M_i ⊙ τ, see `emr`
        magnitude_prune:  Δ = Σ_i c_i top(Δ_i), each tensor's elements of largest magnitude
        dare:             Δ = Σ_i c_i drop(Δ_i) / density, a random subset of the elements
        ties, dare_ties:  the mean, over the vectors whose sign agrees with that of Σ_i Δ'_i, of c_i Δ'_i, where Δ'_i is
                          pruned as in magnitude_prune or dare; where that sum is 0, peft counts it as positive

    All but `linear` and `emr` are implemented by peft. Every vector votes on the signs of `emr`, `ties` and
    `dare_ties`, whatever its coefficient. For models fine-tuned from one base, `linear` interpolates their weights.

    Args:
        vectors: at least one; all of the same layout.
        coefficients: by name, any finite number; 0 for vectors that are not named.
        method: see above.
        density: share of each tensor's elements that are kept, in (0, 1]; required by peft's methods, and only by them.
        seed: of `dare` and `dare_ties`; which elements are dropped does not depend on the coefficients.

    Returns:
        The combination, computed per tensor on access; empty if all coefficients are 0.

    Raises:
        VectorError: if there is no vector, for an unknown name or method, a coefficient that is not finite, or a
            density outside its range.
        MissingPackageError: if peft is needed and not installed.

    Source: task arithmetic: Ilharco et al. (ICLR 2023); rewarded soups: Ramé et al. (NeurIPS 2023); EMR-merging: Huang
    et al. (NeurIPS 2024); TIES: Yadav et al. (NeurIPS 2023); DARE: Yu et al. (ICML 2024).

    Examples:
        >>> import copy
        >>> import mavis
        >>> from mavis.vectors import AlignmentVector, combine
        >>> base, _ = mavis.embedded.load()
        >>> one, other = copy.deepcopy(base), copy.deepcopy(base)
        >>> one.model.norm.weight += 0.5
        >>> other.model.norm.weight -= 1.0
        >>> vectors = {"one": AlignmentVector.between(base, one), "other": AlignmentVector.between(base, other)}
        >>> combine(vectors, {"one": 1.0, "other": 0.25}).tensors["model.norm.weight"][:2]
        tensor([0.2500, 0.2500])
    """
    if not isinstance(vectors, Mapping) or not vectors:
        raise VectorError(f"vectors is {vectors!r}.", "pass at least one by name, e.g. {'medical': vector}.")
    factors = check_coefficients(vectors, coefficients)
    if method not in get_args(Method):
        raise VectorError(f"method is {method!r}.", closest(str(method), get_args(Method)))
    if (density is not None) != (method in _PEFT_FUNCTIONS):
        needs = "needs a density" if method in _PEFT_FUNCTIONS else "takes no density"
        raise VectorError(
            f"density is {density} and method is {method!r}, which {needs}.", "e.g. method='ties', density=0.2."
        )
    all_vectors = list(vectors.values())
    if not any(factors):
        return lazy_vector(all_vectors, [], all_vectors[0].tensors.__getitem__)
    if method == "linear":
        return weighted_sum([(c, vector) for c, vector in zip(factors, all_vectors, strict=True) if c])
    if method == "emr":
        return emr(all_vectors, factors)
    assert density is not None
    return _combine_with_peft(all_vectors, factors, method, finite(density, "density"), seed)


def check_coefficients(vectors: Mapping[str, AlignmentVector], coefficients: Mapping[str, float]) -> list[float]:
    """Return one coefficient per vector, in the order of the vectors.

    Raises:
        VectorError: if a name is unknown, or a coefficient is not a finite number.
    """
    if not isinstance(coefficients, Mapping):
        raise VectorError(
            f"coefficients is a {type(coefficients).__name__}.", "pass a number by name, e.g. {'medical': 0.5}."
        )
    for name in coefficients:
        if name not in vectors:
            raise VectorError(f"coefficients names unknown vector {name!r}.", closest(str(name), vectors))
    return [finite(coefficients.get(name, 0.0), f"the coefficient of {name!r}") for name in vectors]


def _combine_with_peft(
    vectors: list[AlignmentVector], factors: list[float], method: str, density: float, seed: int
) -> AlignmentVector:
    if not 0 < density <= 1:
        raise VectorError(
            f"density is {density}, expected more than 0 and at most 1.", "0.2 keeps every fifth element."
        )
    merge = getattr(import_optional("peft.utils.merge_utils", f"method {method!r}", "vectors"), _PEFT_FUNCTIONS[method])

    def merged(name: str) -> Tensor:
        shape = vectors[0].layout.shapes[name]
        tensors = [v.tensors[name] if name in v.tensors else torch.zeros(shape) for v in vectors]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that a density of 1 prunes nothing
            # A seed per tensor, so that the order of access does not matter. Only the default generator is seeded:
            # torch.manual_seed would also seed every accelerator's, which the fork does not restore.
            torch.default_generator.manual_seed(zlib.crc32(name.encode(), seed))
            result: Tensor = merge(tensors, torch.tensor(factors), density)
        return result

    return lazy_vector(vectors, changed_names(vectors), merged)
