"""Alignment vectors by name: levels of them for a policy, or a new model with them in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mavis.errors import VectorError
from mavis.vectors.applying import Applied, Keep
from mavis.vectors.combine import Method, combine
from mavis.vectors.merge import write_merged
from mavis.vectors.vector import AlignmentVector


class Vectors(Mapping[str, AlignmentVector]):
    """Alignment vectors by name.

        with vectors.applied(policy, {"medical": 0.5, "legal": -1.0}):
            policy.generate(...)

    Args:
        vectors: by name, each a vector or the folder of one; all of one layout, not necessarily of one base.

    Raises:
        VectorError: if there is none, a folder holds none, or two differ in architecture, names, shapes or ties.

    Source: preference levels at inference: Alignment Vectors, arXiv 2410.19206.
    """

    def __init__(self, vectors: Mapping[str, AlignmentVector | str | os.PathLike[str]]) -> None:
        if not isinstance(vectors, Mapping) or not vectors:
            raise VectorError(f"vectors is {vectors!r}.", "give at least one by name, e.g. {'medical': vector}.")
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
        """Make one vector of them; see `mavis.vectors.combine`."""
        return combine(self, coefficients, method, density, seed)

    def applied(
        self,
        policy: Any,
        coefficients: Mapping[str, float],
        *,
        method: Method = "linear",
        density: float | None = None,
        seed: int = 0,
        keep: Keep = "cpu",
    ) -> Applied:
        """Add the vectors to a policy's weights for the time of a `with` block.

            θ' = round(θ + Δ),   Δ the combination of the vectors

        Afterwards every tensor is, bit for bit, what it was, also after an exception: the tensors that change are kept
        and put back, nothing is subtracted. By `linear` with coefficient 1 for one vector, the policy is its aligned
        model, up to rounding where a precision is lower than float32.

        Args:
            policy: a causal LM of the vectors' layout, in any precision and on any device, with any weights.
            coefficients: see `combine`.
            method: see `combine`.
            density: see `combine`.
            seed: see `combine`.
            keep: `cpu` keeps the policy's own tensors in memory, `disk` in a folder for temporary files.

        Returns:
            A context manager, which gives the policy.

        Raises:
            VectorError: see `combine` and `Applied`.
        """
        vector = combine(self, coefficients, method, density, seed)
        names = [name for name, coefficient in coefficients.items() if coefficient]
        return Applied(policy, vector, names or coefficients, keep)

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
        """Write a base's folder plus the vectors as a new folder; see `combine` and `write_merged`."""
        return write_merged(base, combine(self, coefficients, method, density, seed), output)
