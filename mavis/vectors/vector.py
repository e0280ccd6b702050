"""Alignment vectors: what fine-tuning has added to a model's weights, as something to calculate with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mavis.errors import VectorError
from mavis.policies.fingerprint import Fingerprint
from mavis.vectors.adapter import adapter_differences, is_adapter
from mavis.vectors.model_tensors import Layout, ModelOrFolder, ModelTensors, subtracted, tensors_of
from mavis.vectors.tensor_files import FLOATS, Lazy
from mavis.vectors.vector_folder import VectorContent, load_vector, save_vector


class AlignmentVector:
    """The weights of an aligned model minus those of its base.

        Δ = θ_aligned − θ_base

    It is calculated with like a vector: `0.5 * medical - legal`. A vector of two folders, one that was loaded, and
    whatever is calculated from such, read their files when they are used and hold nothing in memory.

    Args:
        tensors: Δ by name, float32 and finite; tensors that did not change are left out, tied ones are there once.
        layout: of the base and of every policy it can be added to.
        base: the fingerprint of the base.

    Source: Alignment Vectors, arXiv 2410.19206; task vectors: Ilharco et al. (ICLR 2023).
    """

    __array_ufunc__ = None  # a numpy number times a vector is a vector and no array

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, base: Fingerprint) -> None:
        self.tensors, self.layout, self.base = tensors, layout, base

    @classmethod
    def between(cls, base: ModelOrFolder, aligned: ModelOrFolder) -> AlignmentVector:
        """Subtract a base from its aligned version, in float32 whatever the precision of each.

        Args:
            base: a causal LM, or a folder with `config.json` and safetensors.
            aligned: the same, or the folder of a LoRA adapter for the base, which peft reads.

        Returns:
            The vector. If one of the two is a model, it is held in memory, rounded to the wider precision of the two;
            else it is read from the folders when it is used, one tensor of each at a time.

        Raises:
            VectorError: if the two differ in architecture, names, shapes or ties, if a tensor that differs is
                quantised, or if a difference is not finite.
        """
        one = tensors_of(base, "base")
        if is_adapter(aligned):
            assert isinstance(aligned, str | os.PathLike)
            differences, in_memory = adapter_differences(one, aligned), False
        else:
            other = tensors_of(aligned, "aligned")
            one.layout.check(other.layout, "aligned", "base")
            differences = Lazy(one, lambda name: _difference(one, other, name))
            in_memory = one.stored is None or other.stored is None
        names, held = [], dict[str, Tensor]()
        for name in differences:
            difference = differences[name]
            if in_memory:  # rounded as the sum will be, so that a vector takes no more than a model
                difference = difference.to(torch.promote_types(one[name].dtype, other[name].dtype))
            if not bool(difference.isfinite().all()):
                raise VectorError(f"aligned − base is not finite in {name!r}.", "look for NaN in the two models.")
            if bool(difference.any()):
                names.append(name)
                if in_memory:
                    held[name] = difference
        make = (lambda name: held[name].float()) if in_memory else differences.__getitem__
        return cls(Lazy(names, make), one.layout, one.fingerprint)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AlignmentVector:
        """Open a vector's folder; its tensors are read when they are used.

        Args:
            folder: what `save` wrote.

        Raises:
            VectorError: if it is missing, no vector's, corrupt or truncated.
        """
        return cls(*load_vector(folder))

    def save(
        self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
    ) -> None:
        """Write the vector as `config.json` and safetensors, whole or not at all.

        Args:
            folder: where; an older vector there is replaced.
            dtype: what is written; bfloat16 or float16 halve the files and round.
            max_shard_size: the most that one file holds, and so that is in memory, such as `1GB`.

        Raises:
            VectorError: if the folder holds something that is no vector, a number is beyond the dtype, for another
                dtype, or if there is no space.
        """
        save_vector(VectorContent(self.tensors, self.layout, self.base), folder, dtype, max_shard_size)

    def norm(self) -> float:
        """Compute the Euclidean length, √Σ Δ², over all tensors."""
        return math.sqrt(_dot(self, self))

    def cosine(self, other: AlignmentVector) -> float:
        """Compute the cosine of the angle between two vectors, ⟨Δ, Δ'⟩ / (‖Δ‖·‖Δ'‖).

        Raises:
            VectorError: if one of them is zero, or they are of different layouts.
        """
        _check_alike([self, other])
        norms = self.norm() * other.norm()
        if norms == 0:
            raise VectorError("one of the vectors is zero, which has no direction.", "leave it out.")
        return min(1.0, max(-1.0, _dot(self, other) / norms))

    def check(self, policy: ModelOrFolder) -> None:
        """Refuse a policy that the vector cannot be added to; its weights need not be those of the vector's base.

        Raises:
            VectorError: if architecture, names, shapes or ties differ; names the first that do.
        """
        self.layout.check(tensors_of(policy, "policy").layout, "policy", "the vector")

    def is_from(self, policy: ModelOrFolder) -> bool:
        """Whether the policy has the weights of the vector's base, as far as the fingerprint's sample of them tells.

        A vector may be added to others too, as a transfer.
        """
        return tensors_of(policy, "policy").fingerprint == self.base

    def __add__(self, other: AlignmentVector) -> AlignmentVector:
        return weighted_sum([(1.0, self), (1.0, other)]) if isinstance(other, AlignmentVector) else NotImplemented

    def __sub__(self, other: AlignmentVector) -> AlignmentVector:
        return weighted_sum([(1.0, self), (-1.0, other)]) if isinstance(other, AlignmentVector) else NotImplemented

    def __mul__(self, factor: float) -> AlignmentVector:
        if not isinstance(factor, Real):
            return NotImplemented
        return weighted_sum([(finite(factor, "factor"), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> AlignmentVector:
        if not isinstance(divisor, Real):
            return NotImplemented
        if finite(divisor, "divisor") == 0:
            raise VectorError("divisor is 0.", "divide by another number.")
        return self * (1 / float(divisor))

    def __neg__(self) -> AlignmentVector:
        return self * -1.0

    def __repr__(self) -> str:
        changed = f"{len(self.tensors)} of {len(self.layout.shapes)} tensors"
        return f"AlignmentVector({self.layout.model_type}, {changed}, base {self.base.weights})"


def finite(number: Any, what: str) -> float:
    """Return a finite number as a float.

    Raises:
        VectorError: if it is none.
    """
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise VectorError(f"{what} is {number!r}, expected a finite number.", "give a number such as 0.5 or -1.")
    return float(number)


def weighted_sum(terms: Sequence[tuple[float, AlignmentVector]]) -> AlignmentVector:
    """Add vectors up, in float32 and tensor by tensor when they are used.

        Δ = Σ_i c_i Δ_i

    Args:
        terms: at least one, each a finite coefficient and a vector.

    Raises:
        VectorError: if the vectors are of different layouts.
    """
    vectors = [vector for _, vector in terms]

    def total(name: str) -> Tensor:
        parts = [(factor, vector.tensors[name]) for factor, vector in terms if name in vector.tensors]
        (factor, first), *others = parts
        if factor == 1 and not others:  # which takes no memory
            return first
        result = first * factor
        for factor, tensor in others:
            result.add_(tensor, alpha=factor)
        return result

    return made_of(vectors, names_of(vectors), total)


def made_of(vectors: Sequence[AlignmentVector], names: Sequence[str], make: Callable[[str], Tensor]) -> AlignmentVector:
    """Build a vector that is calculated from others when it is used.

    Raises:
        VectorError: if the vectors are of different layouts.
    """
    _check_alike(vectors)
    base = vectors[0].base
    if any(vector.base != base for vector in vectors):
        base = replace(base, weights="several")
    return AlignmentVector(Lazy(names, make), vectors[0].layout, base)


def names_of(vectors: Sequence[AlignmentVector]) -> list[str]:
    """List the tensors that at least one of the vectors has, in the order of the layout."""
    return [name for name in vectors[0].layout.shapes if any(name in vector.tensors for vector in vectors)]


def _check_alike(vectors: Sequence[AlignmentVector]) -> None:
    for vector in vectors[1:]:
        vectors[0].layout.check(vector.layout, "one vector", "another")


def _difference(base: ModelTensors, aligned: ModelTensors, name: str) -> Tensor:
    one, other = base[name], aligned[name]
    if one.dtype not in FLOATS or other.dtype not in FLOATS:
        if one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu()):
            return torch.zeros(())
        raise VectorError(
            f"{name!r} is {one.dtype} in base and {other.dtype} in aligned, and differs.",
            "load both without quantisation.",
        )
    return subtracted(other, one)


def _dot(one: AlignmentVector, other: AlignmentVector) -> float:
    shared = [name for name in one.tensors if name in other.tensors]
    return float(sum(float((one.tensors[name].double() * other.tensors[name].double()).sum()) for name in shared))
