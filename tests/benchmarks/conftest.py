"""Access to the benchmarks, which are scripts outside any package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"


def rows_of(name: str) -> list[dict[str, Any]]:
    """Read the rows of a result file."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    return rows


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmarks importable, as they are to each other when run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
