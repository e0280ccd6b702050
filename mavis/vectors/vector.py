"""Alignment vectors: the weight differences of fine-tuning, with vector arithmetic."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mavis.errors import VectorError, check_number
from mavis.policies.embeddings import is_quantised
from mavis.policies.fingerprint import Fingerprint
from mavis.vectors.adapter import adapter_differences, is_adapter
from mavis.vectors.model_tensors import Layout, ModelOrFolder, ModelTensors, subtracted, tensors_of
from mavis.vectors.tensor_files import FLOATS, LazyTensors
from mavis.vectors.vector_folder import VectorContent, load_vector, save_vector


class AlignmentVector:
    """The weights of an aligned model minus those of its base.

        Δ = θ_aligned − θ_base

    It supports vector arithmetic: `0.5 * medical - legal`. Vectors between two folders, loaded vectors, and everything
    computed from such read their files on access and hold no tensors in memory.

    Args:
        tensors: Δ by name, float32 and finite; without tensors that did not change, and tied ones once.
        layout: of the base and of every policy that the vector can be added to.
        base: the fingerprint of the base.

    Source: Alignment Vectors, arXiv 2410.19206; task vectors: Ilharco et al. (ICLR 2023).

    Examples:
        >>> import copy
        >>> import mavis
        >>> from mavis.vectors import AlignmentVector
        >>> base, _ = mavis.embedded.load()
        >>> aligned = copy.deepcopy(base)
        >>> aligned.model.norm.weight += 0.5  # stands for fine-tuning
        >>> vector = AlignmentVector.between(base, aligned)
        >>> list(vector.tensors), vector.is_from(base)
        (['model.norm.weight'], True)
        >>> round((3 * vector - vector).norm() / vector.norm(), 4)
        2.0
    """

    __array_ufunc__ = None  # a numpy number times a vector is a vector, not an array

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, base: Fingerprint) -> None:
        self.tensors, self.layout, self.base = tensors, layout, base

    @classmethod
    def between(cls, base: ModelOrFolder, aligned: ModelOrFolder) -> AlignmentVector:
        """Subtract a base from its aligned version, in float32 whatever the precision of each.

        Args:
            base: a causal LM, or a folder with `config.json` and safetensors.
            aligned: the same, or the folder of a LoRA adapter for the base, read by peft.

        Returns:
            The vector. If one of the two is a model, it is held in memory, rounded to the wider precision of the two;
            otherwise it is read from the folders on access, one tensor at a time.

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
            differences = LazyTensors(one, lambda name: _difference(one, other, name))
            in_memory = one.stored is None or other.stored is None
        names, cached = [], dict[str, Tensor]()
        for name in differences:
            difference = differences[name]
            if in_memory:  # rounded as the sum will be, so that a vector takes no more memory than a model
                difference = difference.to(torch.promote_types(one[name].dtype, other[name].dtype))
            if not bool(difference.isfinite().all()):
                raise VectorError(f"aligned − base is not finite in {name!r}.", "look for NaN in the two models.")
            if bool(difference.any()):
                names.append(name)
                if in_memory:
                    cached[name] = difference
        compute = (lambda name: cached[name].float()) if in_memory else differences.__getitem__
        return cls(LazyTensors(names, compute), one.layout, one.fingerprint)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AlignmentVector:
        """Open a vector's folder; its tensors are read on access.

        Args:
            folder: that `save` wrote.

        Raises:
            VectorError: if it is missing, holds no vector, or is corrupt or truncated.
        """
        return cls(*load_vector(folder))

    def save(
        self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
    ) -> None:
        """Write the vector atomically, as `config.json` and safetensors.

        Args:
            folder: where to; an existing vector there is replaced.
            dtype: to round to; bfloat16 or float16 halve the size.
            max_shard_size: maximum size of a file, and thereby of what is in memory, such as `1GB`.

        Raises:
            VectorError: if the folder holds something other than a vector, the dtype is unsupported, a number overflows
                it, or the files cannot be written.
        """
        save_vector(VectorContent(self.tensors, self.layout, self.base), folder, dtype, max_shard_size)

    def norm(self) -> float:
        """Compute the Euclidean norm, √Σ Δ², over all tensors."""
        return math.sqrt(_dot(self, self))

    def cosine(self, other: AlignmentVector) -> float:
        """Compute the cosine of the angle between two vectors, ⟨Δ, Δ'⟩ / (‖Δ‖·‖Δ'‖).

        Raises:
            VectorError: if one of them is zero, or their layouts differ.
        """
        _check_same_layout([self, other])
        norms = self.norm() * other.norm()
        if norms == 0:
            raise VectorError("one of the vectors is zero, which has no direction.", "leave it out.")
        return min(1.0, max(-1.0, _dot(self, other) / norms))

    def check(self, policy: ModelOrFolder) -> None:
        """Check that the vector can be added to a policy, whose weights need not be those of the vector's base.

        Raises:
            VectorError: if architecture, names, shapes or ties differ; names the first that do.
        """
        self.layout.check(tensors_of(policy, "policy").layout, "policy", "the vector")

    def is_from(self, policy: ModelOrFolder) -> bool:
        """Return whether the policy has the weights of the vector's base, judged by the fingerprint's sample of them.

        A vector can be added to other policies as well, which transfers it.
        """
        return self.base.matches(tensors_of(policy, "policy").fingerprint)

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

    Args:
        number: to check.
        what: it is, for the error.

    Raises:
        VectorError: if it is not a finite number.
    """
    check_number(VectorError, "pass a number such as 0.5 or -1.", **{what: number})
    return float(number)


def weighted_sum(terms: Sequence[tuple[float, AlignmentVector]]) -> AlignmentVector:
    """Add vectors up in float32, one tensor at a time on access.

        Δ = Σ_i c_i Δ_i

    Args:
        terms: at least one finite coefficient and its vector.

    Raises:
        VectorError: if the layouts of the vectors differ.
    """
    vectors = [vector for _, vector in terms]

    def total(name: str) -> Tensor:
        parts = [(factor, vector.tensors[name]) for factor, vector in terms if name in vector.tensors]
        (factor, first), *others = parts
        if factor == 1 and not others:  # needs no copy
            return first
        result = first * factor
        for factor, tensor in others:
            result.add_(tensor, alpha=factor)
        return result

    return lazy_vector(vectors, changed_names(vectors), total)


def lazy_vector(
    vectors: Sequence[AlignmentVector], names: Sequence[str], compute: Callable[[str], Tensor]
) -> AlignmentVector:
    """Build a vector that is computed from others on access.

    Args:
        vectors: that it is computed from.
        names: of its tensors.
        compute: returns a tensor, given its name.

    Raises:
        VectorError: if the layouts of the vectors differ.
    """
    _check_same_layout(vectors)
    base = vectors[0].base
    if any(vector.base != base for vector in vectors):
        base = replace(base, weights="several")
    return AlignmentVector(LazyTensors(names, compute), vectors[0].layout, base)


def changed_names(vectors: Sequence[AlignmentVector]) -> list[str]:
    """List the tensors that at least one vector changes, in the order of the layout."""
    return [name for name in vectors[0].layout.shapes if any(name in vector.tensors for vector in vectors)]


def _check_same_layout(vectors: Sequence[AlignmentVector]) -> None:
    for vector in vectors[1:]:
        vectors[0].layout.check(vector.layout, "one vector", "another")


def _difference(base: ModelTensors, aligned: ModelTensors, name: str) -> Tensor:
    one, other = base[name], aligned[name]
    for tensor, whose in ((one, "base"), (other, "aligned")):
        if tensor.dtype in FLOATS and is_quantised(tensor):
            raise VectorError(
                f"{name!r} is {type(tensor).__name__} in {whose}, which cannot be subtracted.",
                "load both without quantisation.",
            )
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
