"""Which alignment vectors are in which policy's weights at the moment."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AppliedVectors:
    """The alignment vectors that are in a policy's weights for a while.

    Args:
        names: of the vectors.
        weights_before: the hash of the policy's weights without them.
        has_effect: whether they change any weight.
    """

    names: tuple[str, ...]
    weights_before: str
    has_effect: bool = True


vectors_of_policies: weakref.WeakKeyDictionary[Any, AppliedVectors] = weakref.WeakKeyDictionary()
"""Which vectors are applied to which policy; `mavis.vectors` writes it."""


def applied_vectors(policy: Any) -> AppliedVectors | None:
    """Say which alignment vectors are in a policy's weights, or in those of a model that it wraps."""
    found = (vectors_of_policies.get(module) for module in policy.modules())
    return next((added for added in found if added is not None), None)
