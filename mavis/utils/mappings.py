"""Nested mappings as flat ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name every value of a nested mapping by its path.

    Args:
        values: mappings inside it are flattened; an empty one is kept as a value.
        prefix: put before every name.

    Examples:
        >>> flatten({"beta": 4.0, "fit": {"epochs": 6}})
        {'beta': 4.0, 'fit.epochs': 6}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
