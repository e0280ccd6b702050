"""The registry of alignment vectors currently applied to policies."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from mavis.policies.protocol import CausalLM


@dataclass(frozen=True)
class AppliedVectors:
    """The alignment vectors applied to a policy.

    Args:
        names: of the vectors.
        weights_before: hash of the policy's weights without them.
        has_effect: whether they change any weight.
    """

    names: tuple[str, ...]
    weights_before: str
    has_effect: bool = True


vectors_of_policies: weakref.WeakKeyDictionary[Any, AppliedVectors] = weakref.WeakKeyDictionary()
"""Applied vectors by policy; written by `mavis.vectors`."""


def applied_vectors(policy: CausalLM) -> AppliedVectors | None:
    """Return the alignment vectors applied to a policy, or to a model that it wraps; None if there are none."""
    found = (vectors_of_policies.get(module) for module in policy.modules())
    return next((vectors for vectors in found if vectors is not None), None)
