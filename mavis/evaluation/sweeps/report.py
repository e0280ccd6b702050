"""The runs of a sweep as a table for programs, one for people, and a picture."""

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
"""What the picture may be written as."""


def write_runs(folder: str | os.PathLike[str], runs: Sequence[Mapping[str, Any]], picture: str = "png") -> list[Path]:
    """Write `runs.csv`, `runs.md` and `runs.png`.

    Args:
        folder: where; older ones there are replaced.
        runs: from `gather_runs`, at least one.
        picture: its format, `png`, `svg` or `pdf`.

    Returns:
        The paths that were written; there is no picture where no run has a figure.

    Raises:
        ConfigError: if the format is unknown.
    """
    if picture not in FORMATS:
        raise ConfigError(f"format is {picture!r}.", f"known: {', '.join(FORMATS)}.")
    place = Path(folder)
    rows = table_of_runs(runs)
    paths = [place / "runs.csv", place / "runs.md"]
    with atomic_file(paths[0]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with atomic_file(paths[1]) as temporary:
        temporary.write_text(_markdown(rows), encoding="utf-8")
    if any(run["rewards"] or _efficient(run) for run in runs):
        paths.append(place / f"runs.{picture}")
        plot_runs(paths[2], runs)
    return paths


def table_of_runs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay runs out as rows with the same columns; what a run does not have is None.

    Args:
        runs: from `gather_runs`, at least one.
    """
    goals = list(dict.fromkeys(goal for run in runs for goal in run["rewards"]))
    targets = sorted({kl for run in runs for kl in run["efficiency"]})
    rounds = any(run["iterations"] for run in runs)
    return [
        {
            "run": run["run"],
            **run["settings"],
            "state": run["state"],
            **({"iterations": "/".join(map(str, run["iterations"] or ())) or None} if rounds else {}),
            **{f"reward {goal}": run["rewards"].get(goal) for goal in goals},
            **{f"KL {goal}": run["kl"].get(goal) for goal in goals},
            **{f"efficiency at KL {kl:g}": run["efficiency"].get(kl) for kl in targets},
            **({"error": run["error"]} if any(run["error"] for run in runs) else {}),
        }
        for run in runs
    ]


def _efficient(run: Mapping[str, Any]) -> bool:
    return any(share is not None for share in run["efficiency"].values())


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows], digits=3)
    finished = sum(row["state"] == FINISHED for row in rows)
    return f"{table}\n\n{finished} of {len(rows)} runs finished. Rewards and KL are those of the last iteration.\n"
