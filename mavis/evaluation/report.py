"""A report on disk: JSON for programs, CSV for spreadsheets, two plots for people."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mavis.evaluation.plots import plot_front, plot_frontier
from mavis.utils.files import atomic_file, write_json


def write_report(folder: str | os.PathLike[str], report: dict[str, Any]) -> list[Path]:
    """Write `report.json`, `report.csv`, `frontier.png` and, for two objectives or more, `front.png`.

    Args:
        folder: where; older reports there are replaced.
        report: from `evaluate`.

    Returns:
        The paths that were written.
    """
    place = Path(folder)
    paths = [place / "report.json", place / "report.csv", place / "frontier.png"]
    write_json(paths[0], report)
    with atomic_file(paths[1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = [_flat(row) for row in report["rows"]]
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot_frontier(paths[2], report["rows"], _limits_with_target(report), cut=report.get("cut"))
    if len(report["objectives"]) > 1:
        paths.append(place / "front.png")
        plot_front(paths[3], report["rows"], report["objectives"])
    return paths


def _limits_with_target(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Join to each limit the efficiency at the largest target KL at which it is known."""
    joined = []
    for limit in report["limits"]:
        known = [e for e in report["efficiency"] if e["weights"] == limit["weights"] and e["efficiency"] is not None]
        shown = max(known, key=lambda entry: entry["kl"], default=None)
        target = {"target_kl": shown["kl"], "efficiency": shown["efficiency"]} if shown else {}
        joined.append(limit | target)
    return joined


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": number for inner, number in value.items()})
        else:
            flat[name] = value
    return flat
