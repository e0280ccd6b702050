"""Manifests of what holds rewards: they name the objectives' identities, so that old and new rewards never mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mavis.errors import DataError
from mavis.rewards import Objective, objective_identity
from mavis.rewards.identity import is_as_in_first_release
from mavis.utils.files import has_results, matches_manifest, read_json, write_json

_KEY = "scoring"

_ADDED_SETTINGS = {"kl_label": "to_come", "min_new_tokens": 0}
"""Settings that version 0.1 did not have, with the values that do what it did."""


def settings_manifest(settings: Any) -> dict[str, Any]:
    """Return what identifies settings in a manifest, such that runs which version 0.1 started can resume.

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
    stored = read_json(path).get(_KEY) if path.is_file() else None
    if not matches_manifest(path, manifest if stored is None else {**manifest, _KEY: stored}, holds):
        return False
    changed = _changed(stored, objectives)
    if not changed:
        return True
    if not has_results(path.parent):
        return False
    raise DataError(
        f"folder {str(path.parent)!r} holds rewards of other objectives: {', '.join(map(repr, changed))} has changed "
        "since, in its code, its options or its files.",
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
    """
    stored = read_json(path).get(_KEY) or {}
    return _changed(stored, {name: objective for name, objective in objectives.items() if name in stored})


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
    write_json(path, {**manifest, _KEY: identities})
