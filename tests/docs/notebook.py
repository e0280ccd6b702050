"""Run a notebook's code cells in one namespace, as `python tests/docs/notebook.py PATH` does to renew its outputs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def code_cells(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the code cells in order."""
    yield from (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def run_cells(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Run each code cell, and yield it with what it prints."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), namespace)
        yield cell, printed.getvalue()


def stored_output(cell: dict[str, Any]) -> str:
    """Join what a cell is stored to have printed."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def main(path: Path) -> None:
    """Run a notebook and store what its cells print."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, (cell, printed) in enumerate(run_cells(notebook), start=1):
        lines = printed.splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
