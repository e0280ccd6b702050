"""Tables in Markdown, from whose cells no text breaks out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]], digits: int = 4) -> str:
    """Lay a table out, without a line end after it; None is a dash.

    Args:
        head: the columns' names, as they are.
        rows: values, one for each column.
        digits: significant ones of a float.
    """
    lines = [head, ["---"] * len(head), *([markdown_cell(value, digits) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_cell(value: Any, digits: int = 4) -> str:
    """Write one value as text that cannot break out of a table's cell."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
