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

    They are taken from the runs that the critics lie in, and otherwise from those that ship with mavis. Whoever wrote
    such a folder must not choose what code runs here: objectives of mavis alone are taken from it, and none of them may
    run code of a checkpoint. Objectives of one's own have to be named again.

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
    own: dict[str, str] = {}
    for path in _beside(checkpoints, MANIFEST):
        stored = read_json(path)
        if isinstance(stored, dict):
            added = {name: _safe(stored[name]) for name in names if name not in found and _is_ours(stored.get(name))}
            found |= added
            own |= {name: stored[name]["source"] for name in names if _is_own(stored.get(name))}
            if added:
                print_note(f"objectives {', '.join(added)} as in {path}")
    missing = [name for name in names if name not in found]
    shipped = {name: _shipped(name) for name in missing}
    if foreign := [name for name in missing if name in own]:
        choice = [own.get(name, name) if name in foreign else name for name in names]
        raise ConfigError(
            f"the critic was trained for {', '.join(own[name] for name in foreign)}, which is code outside mavis.",
            f"if it is yours, name it again: objective=[{','.join(choice)}].",
        )
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


def _is_ours(options: Any) -> bool:
    """Whether a run's objective is one of mavis itself."""
    target = options.get("_target_") if isinstance(options, Mapping) else None
    return isinstance(target, str) and target.startswith("mavis.rewards.")


def _safe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without those that would run code of a checkpoint, and without anything to be instantiated."""
    return {
        name: value for name, value in options.items() if name != "trust_remote_code" and not isinstance(value, Mapping)
    }


def _is_own(options: Any) -> bool:
    """Whether a run's objective was named as `module:name`."""
    return isinstance(options, Mapping) and isinstance(options.get("source"), str)


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
