"""The runs of a hyperparameter sweep, read from their folders, including failed and interrupted ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mavis.errors import DataError, MavisError
from mavis.evaluation.report import mean_efficiency
from mavis.utils.files import read_json

FINISHED, UNFINISHED, FAILED, NOT_STARTED = "finished", "unfinished", "failed", "not started"
"""The states of a run."""

# The file that a command writes last; other commands write `report.json`.
_LAST = {"train": "critic/config.json", "distill": "critic/config.json"}
# Overrides that say where and how fast a run works, not what it computes.
_IRRELEVANT = ("output", "threads", "launcher", "hydra", "search", "tracking")


def gather_runs(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read every run at or below a folder.

    A run is a folder that a command has worked in; an evaluation inside the folder of another run is part of that run.
    Runs that a sweep was asked for and never started are included.

    Args:
        folder: of a sweep, a search, or several of them.

    Returns:
        A dict per run, sorted by path: `run`, its path below `folder`; `state`; `error`, None unless it failed;
        `settings`, those that differ between runs; `iterations`, finished and requested, None where there are none;
        `rewards`, `kl` and `goal` of the last iteration by goal, see `IterationReport`; `efficiency`, the mean frontier
        efficiency by target KL, see `mavis.evaluation.report.mean_efficiency`.

    Raises:
        DataError: if the folder does not exist or holds no run.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"folder is {str(root)!r}, which does not exist.", "name the output folder of a sweep.")
    runs: list[tuple[Path, dict[str, str], dict[str, Any]]] = []
    for path in _run_folders(root):
        overrides, found = _read(path)
        runs.append((path, overrides, found))
    runs += [
        (sweep, overrides, _blank(NOT_STARTED))
        for sweep in sorted(path.parent for path in root.rglob("multirun.yaml"))
        for overrides in _not_started(sweep, [given for path, given, _ in runs if path.is_relative_to(sweep)])
    ]
    if not runs:
        raise DataError(
            f"folder is {str(root)!r}, which holds no run.",
            "name the output folder of a command such as `mavis train -m`.",
        )
    names = list(dict.fromkeys(name for _, overrides, _ in runs for name in overrides))
    differing = [name for name in names if len({overrides.get(name) for _, overrides, _ in runs}) > 1]
    return [
        {
            "run": str(path.relative_to(root)) if found["state"] != NOT_STARTED else "",
            **found,
            "settings": {name: overrides.get(name) or _value(path, name) for name in differing},
        }
        for path, overrides, found in runs
    ]


def _run_folders(root: Path) -> list[Path]:
    """List the folders that commands have worked in, except those inside another such folder."""
    folders: list[Path] = []
    marked = (path.parent.parent for path in root.rglob(".hydra/overrides.yaml"))
    for path in sorted(marked, key=lambda path: (len(path.parts), path)):
        if not any(path.is_relative_to(other) for other in folders):
            folders.append(path)
    return sorted(folders)


def _blank(state: str, error: str | None = None) -> dict[str, Any]:
    empty: dict[str, Any] = {"rewards": {}, "kl": {}, "goal": {}, "efficiency": {}}
    return {"state": state, "error": error, "iterations": None, **empty}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read one run: its overrides and its metrics."""
    overrides: dict[str, str] = {}
    try:
        overrides = _by_name(_override_list(_yaml(path / ".hydra" / "overrides.yaml")))
        command = _yaml(path / ".hydra" / "hydra.yaml").hydra.job.config_name
        return overrides, _metrics(path, str(command))
    except (MavisError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return overrides, _blank(FAILED, f"its folder cannot be read: {type(error).__name__}: {error}")


def _yaml(path: Path) -> Any:
    """Read what Hydra wrote; a file that is not YAML, e.g. truncated by a full disk, is a ValueError."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return OmegaConf.load(path)
    except YAMLError as error:
        raise ValueError(f"{path.name} is truncated or was not written by Hydra") from error


def _override_list(overrides: Any) -> list[str]:
    """List overrides as text, with `${...}` as it was typed."""
    from omegaconf import OmegaConf

    given: Any = OmegaConf.to_container(overrides, resolve=False)
    return list(given)


def _metrics(path: Path, command: str) -> dict[str, Any]:
    found = _blank(FINISHED if (path / _LAST.get(command, "report.json")).is_file() else UNFINISHED)
    if (path / "error.json").is_file():
        found |= {"state": FAILED, "error": str(read_json(path / "error.json")["error"])}
    numbered = {file.parent.name.partition("-")[2]: file for file in path.glob("iteration-*/report.json")}
    reports = [numbered[number] for number in sorted(filter(str.isdecimal, numbered), key=int)]
    if (path / "run.json").is_file() and "iterations" in (settings := read_json(path / "run.json")["settings"]):
        found["iterations"] = [len(reports), settings["iterations"]]
    if reports:
        last = read_json(reports[-1])
        found |= {name: last[name] for name in ("rewards", "kl", "goal")}
    if command == "align" and (path / "report.json").is_file():
        report = read_json(path / "report.json")
        sums = {"rewards": report["reward_after"], "kl": report["kl"], "goal": report["goal"]}
        found |= {name: {"weighted sum": value} for name, value in sums.items()}
    for evaluation in (path / "report.json", *sorted(path.glob("*/report.json"))):
        if evaluation.is_file() and "limits" in (report := read_json(evaluation)):
            targets = sorted({entry["kl"] for entry in report["efficiency"]})
            found["efficiency"] = {kl: mean_efficiency(report, kl) for kl in targets}
            break
    return found


def _by_name(overrides: Sequence[Any]) -> dict[str, str]:
    parts = (str(override).partition("=") for override in overrides)
    pairs = {name.lstrip("+"): value for name, _, value in parts}
    return {name: value for name, value in pairs.items() if name.split(".")[0].split("/")[0] not in _IRRELEVANT}


def _value(path: Path, name: str) -> str | None:
    """Look up a setting that a run did not override; None for a choice of config group."""
    from omegaconf import OmegaConf

    try:
        value = OmegaConf.select(_yaml(path / ".hydra" / "config.yaml"), name)
    except (MavisError, OSError, ValueError):
        return None
    return None if value is None or OmegaConf.is_config(value) else str(value)


def _not_started(sweep: Path, started: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    """List the overrides of the runs that a sweep was asked for and that have no folder."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        given = _override_list(_yaml(sweep / "multirun.yaml").hydra.overrides.task)
        requested = OverridesParser.create().parse_overrides(given)
    except (MavisError, OSError, ValueError, TypeError, AttributeError, HydraException):
        return  # truncated, or not written by Hydra
    if any(override.is_sweep_override() and not override.is_discrete_sweep() for override in requested):
        return
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in requested
    ]
    for choice in product(*choices):
        if (overrides := _by_name(choice)) not in started:
            yield overrides
