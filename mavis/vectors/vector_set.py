"""Named alignment vectors, combined with coefficients and applied to a policy or merged into a new model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mavis.errors import VectorError
from mavis.vectors.applying import AppliedContext, Backup
from mavis.vectors.combine import Method, combine
from mavis.vectors.merge import write_merged
from mavis.vectors.vector import AlignmentVector


class Vectors(Mapping[str, AlignmentVector]):
    """Alignment vectors by name.

        with vectors.applied(policy, {"medical": 0.5, "legal": -1.0}):
            policy.generate(...)

    Args:
        vectors: by name, each a vector or the folder of one; all of the same layout, not necessarily the same base.

    Raises:
        VectorError: if there is none, a folder holds none, or two differ in architecture, names, shapes or ties.

    Source: coefficients chosen at inference: Alignment Vectors, arXiv 2410.19206.

    Examples:
        >>> import copy
        >>> import mavis
        >>> from mavis.vectors import AlignmentVector, Vectors
        >>> policy, _ = mavis.embedded.load()
        >>> aligned = copy.deepcopy(policy)
        >>> aligned.model.norm.weight += 0.5  # stands for fine-tuning
        >>> vectors = Vectors({"medical": AlignmentVector.between(policy, aligned)})
        >>> before = policy.model.norm.weight[0].item()
        >>> with vectors.applied(policy, {"medical": 0.5}):
        ...     round(policy.model.norm.weight[0].item() - before, 4)
        0.25
        >>> policy.model.norm.weight[0].item() == before
        True
    """

    def __init__(self, vectors: Mapping[str, AlignmentVector | str | os.PathLike[str]]) -> None:
        if not isinstance(vectors, Mapping) or not vectors:
            raise VectorError(f"vectors is {vectors!r}.", "pass at least one by name, e.g. {'medical': vector}.")
        self._vectors = {
            name: vector if isinstance(vector, AlignmentVector) else AlignmentVector.load(vector)
            for name, vector in vectors.items()
        }
        (first, one), *others = self._vectors.items()
        for name, vector in others:
            one.layout.check(vector.layout, f"vector {name!r}", f"vector {first!r}")

    def __getitem__(self, name: str) -> AlignmentVector:
        return self._vectors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def combine(
        self,
        coefficients: Mapping[str, float],
        *,
        method: Method = "linear",
        density: float | None = None,
        seed: int = 0,
    ) -> AlignmentVector:
        """Combine the vectors into one; see `mavis.vectors.combine`."""
        return combine(self, coefficients, method, density, seed)

    def applied(
        self,
        policy: Any,
        coefficients: Mapping[str, float],
        *,
        method: Method = "linear",
        density: float | None = None,
        seed: int = 0,
        backup: Backup = "cpu",
    ) -> AppliedContext:
        """Add the vectors to a policy's weights within a `with` block.

            θ' = round(θ + Δ),   Δ the combination of the vectors

        Afterwards every tensor is bit-identical to before, also after an exception: the tensors that change are backed
        up and restored, nothing is subtracted. With `linear` and coefficient 1 for a single vector, the policy equals
        its aligned model, up to rounding in precisions below float32.

        Args:
            policy: a causal LM of the vectors' layout, in any precision and on any device, with any weights.
            coefficients: see `combine`.
            method: see `combine`.
            density: see `combine`.
            seed: see `combine`.
            backup: where the original tensors are stored: `cpu`, in memory, or `disk`, in a temporary folder.

        Returns:
            A context manager, which returns the policy.

        Raises:
            VectorError: see `combine` and `AppliedContext`.
        """
        vector = combine(self, coefficients, method, density, seed)
        names = [name for name, coefficient in coefficients.items() if coefficient]
        return AppliedContext(policy, vector, names or coefficients, backup)

    def merge(
        self,
        base: str | os.PathLike[str],
        coefficients: Mapping[str, float],
        output: str | os.PathLike[str],
        *,
        method: Method = "linear",
        density: float | None = None,
        seed: int = 0,
    ) -> Path:
        """Merge the combined vectors into a base model's folder; see `combine` and `write_merged`."""
        return write_merged(base, combine(self, coefficients, method, density, seed), output)
