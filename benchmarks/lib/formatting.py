"""Formats measurements as the cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

DASH = "–"


def number(value: float | None, decimals: int = 2) -> str:
    """Format a number, or a dash where it is unknown."""
    return DASH if value is None else f"{value:,.{decimals}f}"


def mean_and_range(values: Sequence[float | None], decimals: int = 2) -> str:
    """Format the mean and range of the known values, or a dash if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    return f"{mean(known):.{decimals}f} ({min(known):.{decimals}f} to {max(known):.{decimals}f})"


def mean_and_std(row: dict[str, Any], name: str) -> str:
    """Format a mean and, if there is one, its standard deviation in the column `name_std`."""
    std = row[f"{name}_std"]
    return number(row[name]) + ("" if std is None else f" ± {std:.2f}")


def weights(values: Sequence[float]) -> str:
    """Format preference weights, such as (0.5, 0.5)."""
    return f"({', '.join(f'{value:g}' for value in values)})"


def machine(content: dict[str, Any]) -> str:
    """Describe the hardware of a result file."""
    hardware = content["hardware"]
    return f"{hardware['cores']} cores of an {hardware['cpu']}"
