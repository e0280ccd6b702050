"""Several alignment vectors made into one, by a choice of methods."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from mavis.errors import VectorError, closest, import_optional
from mavis.vectors.emr import emr
from mavis.vectors.vector import AlignmentVector, finite, made_of, names_of, weighted_sum

Method = Literal["linear", "emr", "ties", "dare", "dare_ties", "magnitude_prune"]
"""How vectors are combined."""

_OF_PEFT = {"ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties", "magnitude_prune": "magnitude_prune"}


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
        magnitude_prune:  Δ = Σ_i c_i top(Δ_i), each tensor's largest elements by size
        dare:             Δ = Σ_i c_i drop(Δ_i) / density, elements kept at random
        ties, dare_ties:  the mean, over the vectors whose sign agrees with that of Σ_i Δ'_i, of c_i Δ'_i, where Δ'_i is
                          pruned as in magnitude_prune or dare; where that sum is 0, peft takes it for plus

    All but `linear` and `emr` are peft's. Every vector takes part in the elections of `emr`, `ties` and `dare_ties`,
    whatever its coefficient. `linear` of models that were fine-tuned from one base is also the interpolation of their
    weights.

    Args:
        vectors: at least one, of one layout.
        coefficients: by name, any finite number; a vector that is not named has 0.
        method: see above.
        density: share of the elements of each tensor that are kept, in (0, 1]; only for peft's methods, which need it.
        seed: of `dare` and `dare_ties`; what is dropped does not depend on the coefficients.

    Returns:
        The combination, computed tensor by tensor when it is used; with all coefficients 0 it changes no tensor.

    Raises:
        VectorError: if there is no vector, for an unknown name or method, a coefficient that is not finite, or a
            density outside its range.
        MissingPackageError: if peft is needed and not installed.

    Source: task arithmetic: Ilharco et al. (ICLR 2023); rewarded soups: Ramé et al. (NeurIPS 2023); EMR-merging: Huang
    et al. (NeurIPS 2024); TIES: Yadav et al. (NeurIPS 2023); DARE: Yu et al. (ICML 2024).
    """
    if not isinstance(vectors, Mapping) or not vectors:
        raise VectorError(f"vectors is {vectors!r}.", "give at least one by name, e.g. {'medical': vector}.")
    factors = checked_coefficients(vectors, coefficients)
    if method not in get_args(Method):
        raise VectorError(f"method is {method!r}.", closest(str(method), get_args(Method)))
    if (density is not None) != (method in _OF_PEFT):
        needs = "needs a density" if method in _OF_PEFT else "takes no density"
        raise VectorError(f"density is {density} and method is {method!r}, which {needs}.", "e.g. method='ties', 0.2.")
    everything = list(vectors.values())
    if not any(factors):
        return made_of(everything, [], everything[0].tensors.__getitem__)
    if method == "linear":
        return weighted_sum([(c, vector) for c, vector in zip(factors, everything, strict=True) if c])
    if method == "emr":
        return emr(everything, factors)
    assert density is not None
    return _by_peft(everything, factors, method, finite(density, "density"), seed)


def checked_coefficients(vectors: Mapping[str, AlignmentVector], coefficients: Mapping[str, float]) -> list[float]:
    """Return one coefficient per vector, in the order of the vectors.

    Raises:
        VectorError: if a name is unknown, or a coefficient is no finite number.
    """
    if not isinstance(coefficients, Mapping):
        raise VectorError(
            f"coefficients is a {type(coefficients).__name__}.", "give a number by name, e.g. {'medical': 0.5}."
        )
    for name in coefficients:
        if name not in vectors:
            raise VectorError(f"coefficients names vector {name!r}.", closest(str(name), vectors))
    return [finite(coefficients.get(name, 0.0), f"the coefficient of {name!r}") for name in vectors]


def _by_peft(
    vectors: list[AlignmentVector], factors: list[float], method: str, density: float, seed: int
) -> AlignmentVector:
    if not 0 < density <= 1:
        raise VectorError(
            f"density is {density}, expected more than 0 and at most 1.", "0.2 keeps every fifth element."
        )
    merge = getattr(import_optional("peft.utils.merge_utils", f"method {method!r}", "vectors"), _OF_PEFT[method])

    def merged(name: str) -> Tensor:
        shape = vectors[0].layout.shapes[name]
        tensors = [v.tensors[name] if name in v.tensors else torch.zeros(shape) for v in vectors]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a density of 1, that it prunes nothing
            # In whatever order the tensors are asked for. This generator alone: torch.manual_seed would seed those of
            # every accelerator too, which the fork does not bring back.
            torch.default_generator.manual_seed(zlib.crc32(name.encode(), seed))
            result: Tensor = merge(tensors, torch.tensor(factors), density)
        return result

    return made_of(vectors, names_of(vectors), merged)
