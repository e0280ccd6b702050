"""Manifests of what holds rewards: they name the objectives' identities, so that old and new rewards never mix."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mavis.errors import DataError, warn_user
from mavis.rewards import Objective, objective_identity
from mavis.rewards.identity import depends_on_python, is_as_in_first_release
from mavis.utils.files import has_results, matches_manifest, read_json, write_json

_KEY, _PYTHON_KEY = "scoring", "scoring_python"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

_ADDED_SETTINGS = {"kl_label": "to_come", "min_new_tokens": 0, "precision": "float32"}
"""Settings that earlier versions did not have, with the values that do what it did."""


def settings_manifest(settings: Any) -> dict[str, Any]:
    """Return what identifies settings in a manifest, such that runs which earlier versions started can resume.

    Args:
        settings: a dataclass.
    """

    def without_added(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in items if name not in _ADDED_SETTINGS or value != _ADDED_SETTINGS[name]}

    return asdict(settings, dict_factory=without_added)


def matches_scored_manifest(
    path: Path, manifest: Mapping[str, Any], objectives: Mapping[str, Objective], holds: str
) -> bool:
    """Compare a folder's manifest and the objectives that scored what it holds; see `matches_manifest`.

    Manifests of version 0.1 do not identify objectives. They match unless an objective of mavis has changed since.

    Args:
        path: the manifest.
        manifest: identifies the run, without its objectives.
        objectives: by name.
        holds: what the folder holds if the manifests differ.

    Returns:
        True if they are equal; False if there is no manifest yet, or only that of a run without results.

    Raises:
        DataError: if they differ; names the keys, or the objectives that have changed.
    """
    found = read_json(path) if path.is_file() else {}
    about_scoring = {key: found[key] for key in (_KEY, _PYTHON_KEY) if key in found}
    if not matches_manifest(path, {**manifest, **about_scoring}, holds):
        return False
    changed = _changed(found.get(_KEY), objectives)
    if not changed:
        return True
    if not has_results(path.parent):
        return False
    if compiled_elsewhere := _compiled_elsewhere(found, changed, objectives):
        raise DataError(
            f"folder {str(path.parent)!r} holds rewards scored under Python {found[_PYTHON_KEY]}, and this is Python "
            f"{_PYTHON}, which compiles code otherwise: whether {_listed(compiled_elsewhere)} has changed cannot be "
            "told.",
            f"resume with Python {found[_PYTHON_KEY]}, or name a new output folder; an objective with an attribute "
            "`version` is identified by that instead of its code.",
        )
    raise DataError(
        f"folder {str(path.parent)!r} holds rewards of other objectives: {_listed(changed)} has changed since, "
        "in its code, its options, its files or the version of a package that it uses.",
        "name a new output folder, or undo the change to resume; an objective with an attribute `version` is "
        "identified by that instead of its code.",
    )


def changed_objectives(path: Path, objectives: Mapping[str, Objective]) -> list[str]:
    """Name the objectives that are others than those of the same name in a manifest.

    Args:
        path: the manifest; one that identifies no objectives tells nothing.
        objectives: by name.

    Raises:
        DataError: if it is damaged.

    Warns:
        UserWarning: if whether some have changed cannot be told, because another version of Python compiled them.
    """
    found = read_json(path)
    stored = found.get(_KEY) or {}
    changed = _changed(stored, {name: objective for name, objective in objectives.items() if name in stored})
    compiled_elsewhere = _compiled_elsewhere(found, changed, objectives)
    if compiled_elsewhere:
        warn_user(
            f"{str(path)!r} is of Python {found[_PYTHON_KEY]}, and this is Python {_PYTHON}, which compiles code "
            f"otherwise: whether {_listed(compiled_elsewhere)} has changed cannot be told."
        )
    return [name for name in changed if name not in compiled_elsewhere]


def _compiled_elsewhere(
    found: Mapping[str, Any], changed: Sequence[str], objectives: Mapping[str, Objective]
) -> list[str]:
    """Name the changed objectives that may only be compiled otherwise, by the version of Python of a manifest."""
    if found.get(_PYTHON_KEY, _PYTHON) == _PYTHON:
        return []
    return [name for name in changed if depends_on_python(objectives[name])]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _changed(stored: Mapping[str, str] | None, objectives: Mapping[str, Objective]) -> list[str]:
    """Name the objectives that are not those of stored identities; None stands for version 0.1."""
    return [
        name
        for name, objective in objectives.items()
        if (
            not is_as_in_first_release(objective)
            if stored is None
            else stored.get(name) != objective_identity(objective)
        )
    ]


def write_scored_manifest(path: Path, manifest: Mapping[str, Any], objectives: Mapping[str, Objective]) -> None:
    """Write a manifest with the identities of the objectives."""
    identities = {name: objective_identity(objective) for name, objective in objectives.items()}
    write_json(path, {**manifest, _KEY: identities, _PYTHON_KEY: _PYTHON})
