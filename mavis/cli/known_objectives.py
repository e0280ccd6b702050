"""The objectives that a critic was trained for: found beside it, so that commands which use it need not be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf, open_dict

from mavis.cli.conf_dir import conf_dir
from mavis.cli.console import print_note
from mavis.errors import ConfigError

if TYPE_CHECKING:
    from mavis.rewards import Objective

MANIFEST = "objectives.json"
"""The file in the folder of a run, beside its critic, that says how its objectives are configured."""


def add_known_objectives(config: Any, checkpoints: Sequence[str], names: Sequence[str]) -> None:
    """Add the objectives of critics to a config that chooses none.

    They are taken from the runs that the critics lie in, and otherwise from those that ship with mavis. What a run
    names is Python code to be called, so nothing of the kind is in a critic's own folder, which others can upload.

    Args:
        config: of a command with the group `objective`; gets `objectives`.
        checkpoints: the critics' folders.
        names: of the critics' objectives.

    Raises:
        ConfigError: if one is neither in a run nor among those that ship.
        DataError: if a run's file is damaged.
    """
    if config.get("objectives"):
        return
    from mavis.utils.files import read_json

    found: dict[str, Any] = {}
    for path in _beside(checkpoints, MANIFEST):
        stored = read_json(path)
        if isinstance(stored, dict):
            added = {name: stored[name] for name in names if name in stored and name not in found}
            found |= added
            if added:
                print_note(f"objectives {', '.join(added)} as in {path}")
    missing = [name for name in names if name not in found]
    shipped = {name: _shipped(name) for name in missing}
    if unknown := [name for name, options in shipped.items() if options is None]:
        raise ConfigError(
            f"nothing beside the critic says what its {'objective is' if len(unknown) == 1 else 'objectives are'}: "
            f"{', '.join(unknown)}.",
            f"name them: objective=[{','.join(names)}], or module:name for those of your own.",
        )
    if missing:
        print_note(f"objectives {', '.join(missing)} as they ship with mavis")
    with open_dict(config):
        config.objectives = {name: found.get(name) or shipped[name] for name in names}


def check_same_objectives(objectives: Mapping[str, Objective], checkpoints: Sequence[str]) -> None:
    """Check that objectives are those that critics were trained for, as far as the critics' runs say.

    Args:
        objectives: by name.
        checkpoints: the critics' folders.

    Raises:
        ConfigError: if one of the same name is another.
    """
    from mavis.rollouts.manifest import changed_objectives

    for path in _beside(checkpoints, "run.json"):
        if changed := changed_objectives(path, objectives):
            raise ConfigError(
                f"the objective {', '.join(map(repr, changed))} is not the one that the critic in "
                f"{str(path.parent)!r} was trained for: its code, options or files differ.",
                "leave out objective=, or undo the change; to measure something else, give it another name in "
                "evaluation.held_out.",
            )


def _beside(checkpoints: Sequence[str], file: str) -> list[Path]:
    """List the files of this name beside critics that are folders."""
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    beside = [folder.resolve().parent / file for folder in folders if folder.is_dir()]
    return [path for path in dict.fromkeys(beside) if path.is_file()]


def _shipped(name: str) -> Any:
    """Return how an objective that ships with mavis is configured; None if there is none, or it needs options."""
    path = Path(conf_dir()) / "objective" / f"{name}.yaml"
    if path.name != f"{name}.yaml" or not path.is_file():  # a name with slashes
        return None
    options = OmegaConf.load(path)
    return None if OmegaConf.missing_keys(options) else OmegaConf.to_container(options)
