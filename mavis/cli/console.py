"""Printing to standard output: lines and tables, from the main process only."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mavis.distributed import join_processes

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_PIPE_WIDTH = 160  # rich would cut cells at 80 columns where there is no terminal


def terminal_text(text: str) -> str:
    """Show control characters, with which a text could rewrite a terminal, as escapes; files get the text as it is.

    Args:
        text: such as a response.
    """
    if not sys.stdout.isatty():
        return text
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_line(text: str) -> None:
    """Print a line; of several processes only the main one does."""
    if join_processes().is_main:
        print(terminal_text(text))


def print_note(text: str) -> None:
    """Print a line about what a command does to standard error, as `print_line` does."""
    if join_processes().is_main:
        print(text, file=sys.stderr, flush=True)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, as `print_line` does.

    Args:
        title: above the table.
        rows: cells by column, the same columns in each row. Numbers are shown with three digits, None as a dash.
    """
    if not join_processes().is_main:
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False) if sys.stdout.isatty() else Console(width=_PIPE_WIDTH, markup=False)
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, no_wrap=True, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(_format_cell(value) for value in row.values()))
    console.print(table)


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number:.3g}" for name, number in value.items() if number)
    if isinstance(value, float):
        return f"{0.0 if abs(value) < 1e-6 else value:.3g}"  # rounding errors around 0 read as 0
    return terminal_text(str(value))
