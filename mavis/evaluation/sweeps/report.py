"""The runs of a hyperparameter sweep on disk: CSV for programs, Markdown and a plot for people."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mavis.errors import ConfigError
from mavis.evaluation.sweeps.plots import plot_runs
from mavis.evaluation.sweeps.runs import FINISHED
from mavis.utils.files import atomic_file
from mavis.utils.markdown import markdown_table

FORMATS = ("png", "svg", "pdf")
"""File formats of the plot."""


def write_runs(
    folder: str | os.PathLike[str], runs: Sequence[Mapping[str, Any]], plot_format: str = "png"
) -> list[Path]:
    """Write `runs.csv`, `runs.md` and `runs.png`.

    Args:
        folder: where to; existing files there are replaced.
        runs: from `gather_runs`, at least one.
        plot_format: of the plot, `png`, `svg` or `pdf`.

    Returns:
        The paths of the files; without a plot if no run has metrics.

    Raises:
        ConfigError: if the format is unknown.
    """
    if plot_format not in FORMATS:
        raise ConfigError(
            f"format is {plot_format!r}, which plots cannot be written in.", f"known: {', '.join(FORMATS)}."
        )
    target = Path(folder)
    rows = table_of_runs(runs)
    paths = [target / "runs.csv", target / "runs.md"]
    with atomic_file(paths[0]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with atomic_file(paths[1]) as temporary:
        temporary.write_text(_markdown(rows), encoding="utf-8")
    if any(run["rewards"] or _has_efficiency(run) for run in runs):
        paths.append(target / f"runs.{plot_format}")
        plot_runs(paths[2], runs)
    return paths


def table_of_runs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tabulate runs as rows with the same columns; None where a run has no value.

    Args:
        runs: from `gather_runs`, at least one.
    """
    goals = list(dict.fromkeys(goal for run in runs for goal in run["rewards"]))
    targets = sorted({kl for run in runs for kl in run["efficiency"]})
    has_iterations = any(run["iterations"] for run in runs)
    return [
        {
            "run": run["run"],
            **run["settings"],
            "state": run["state"],
            **({"iterations": "/".join(map(str, run["iterations"] or ())) or None} if has_iterations else {}),
            **{f"reward {goal}": run["rewards"].get(goal) for goal in goals},
            **{f"KL {goal}": run["kl"].get(goal) for goal in goals},
            **{f"efficiency at KL {kl:g}": run["efficiency"].get(kl) for kl in targets},
            **({"error": run["error"]} if any(run["error"] for run in runs) else {}),
        }
        for run in runs
    ]


def _has_efficiency(run: Mapping[str, Any]) -> bool:
    return any(share is not None for share in run["efficiency"].values())


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows], digits=3)
    finished = sum(row["state"] == FINISHED for row in rows)
    return f"{table}\n\n{finished} of {len(rows)} runs finished. Rewards and KL are those of the last iteration.\n"
