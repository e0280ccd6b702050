"""An evaluation report on disk: JSON for programs, CSV for spreadsheets, two plots for people."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mavis.evaluation.plots import plot_front, plot_frontier
from mavis.evaluation.report import EvaluationReport
from mavis.utils.files import atomic_file, write_json


def write_report(folder: str | os.PathLike[str], report: EvaluationReport) -> list[Path]:
    """Write `report.json`, `report.csv`, `frontier.png` and, for two or more objectives, `front.png`.

    Args:
        folder: where to; existing reports there are replaced.
        report: from `evaluate`.

    Returns:
        The paths of the files.

    Examples:
        >>> import tempfile
        >>> import mavis
        >>> from mavis.evaluation import EvaluationSettings, evaluate, write_report
        >>> from mavis.rewards import Positive
        >>> from mavis.rollouts import RolloutSettings
        >>> policy, tokenizer = mavis.embedded.load()
        >>> critic = mavis.HiddenStateCritic.for_policy(policy, ["positive"], hidden=4, rank=2)
        >>> sampling = RolloutSettings(max_new_tokens=4, top_k=None)
        >>> settings = EvaluationSettings(1, (1.0,), samples=2, reference_samples=2, speed_repeats=0, sampling=sampling)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = evaluate(
        ...         policy, tokenizer, critic, {"positive": Positive()}, ["The dog"], folder, settings
        ...     )
        ...     [path.name for path in write_report(folder, report)]
        ['report.json', 'report.csv', 'frontier.png']
    """
    target, data = Path(folder), report.to_json()
    paths = [target / "report.json", target / "report.csv", target / "frontier.png"]
    write_json(paths[0], data)
    with atomic_file(paths[1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = [_flattened(row) for row in data["rows"]]
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot_frontier(paths[2], data["rows"], _limits_with_target(data), truncated=data["cut"])
    if len(report.objectives) > 1:
        paths.append(target / "front.png")
        plot_front(paths[3], data["rows"], report.objectives)
    return paths


def _limits_with_target(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add to each limit the efficiency at the largest target KL where it is known."""
    joined = []
    for limit in report["limits"]:
        known = [e for e in report["efficiency"] if e["weights"] == limit["weights"] and e["efficiency"] is not None]
        largest = max(known, key=lambda entry: entry["kl"], default=None)
        target = {"target_kl": largest["kl"], "efficiency": largest["efficiency"]} if largest else {}
        joined.append(limit | target)
    return joined


def _flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": number for key, number in value.items()})
        else:
            flat[name] = value
    return flat
