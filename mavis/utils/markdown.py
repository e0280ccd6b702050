"""Markdown tables whose cells cannot break the layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_RULES = {"l": ":--", "c": ":-:", "r": "--:"}


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    digits: int = 4,
    *,
    decimals: int | None = None,
    align: str | None = None,
) -> str:
    """Format a table, without a line break at its end.

    Args:
        header: the columns' names, written as they are.
        rows: one value per column; see `markdown_cell`.
        digits: significant digits of a float.
        decimals: decimal places of a float, instead of `digits`.
        align: one of `l`, `c` and `r` per column; None leaves the alignment to the reader's program.

    Examples:
        >>> from mavis.utils.markdown import markdown_table
        >>> print(markdown_table(["run", "reward"], [["a|b", 0.123456], ["c", None]], digits=2, align="lr"))
        | run | reward |
        | :-- | --: |
        | a\\|b | 0.12 |
        | c | – |
    """
    rules = ["---"] * len(header) if align is None else [_RULES[side] for side in align]
    cells = ([markdown_cell(value, digits, decimals=decimals) for value in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rules, *cells])


def markdown_cell(value: Any, digits: int = 4, *, decimals: int | None = None) -> str:
    """Format a value as one line of text that cannot end its table cell; None becomes a dash."""
    if value is None:
        return "–"
    text = str(value)
    if isinstance(value, float):
        text = f"{value:.{digits}g}" if decimals is None else f"{value:.{decimals}f}"
    return " ".join(text.split()).replace("|", "\\|")
