"""A critic as a folder: `config.json` says what it is, `model.safetensors` its numbers, `README.md` tells people."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mavis.critics.base import Critic
from mavis.critics.calibration import Calibration
from mavis.critics.card import CARD, is_hub_id, model_card
from mavis.critics.fingerprint import Fingerprint
from mavis.critics.hidden_state import HiddenStateCritic
from mavis.critics.hub import fetch_critic
from mavis.critics.value_model import ValueModelCritic
from mavis.errors import CriticError, MissingPackageError, closest
from mavis.files import atomic_file, atomic_folder, pickles_in, write_json

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_critic(critic: Critic, folder: str | os.PathLike[str]) -> None:
    """Write a critic folder with its model card, whole or not at all.

    Args:
        critic: any critic.
        folder: where; an older critic there is replaced.

    Raises:
        CriticError: if `folder` holds something that is not a critic.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file())):
        raise CriticError(
            f"folder is {str(target)!r}, which exists and is not a critic.",
            "name a new folder or an old critic.",
        )
    with atomic_folder(target) as temporary:
        save_about(critic, temporary)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in critic.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})


def save_about(critic: Critic, folder: Path) -> None:
    """Write `config.json` and the model card into a critic's folder and leave its weights as they are.

    Args:
        critic: the one whose weights the folder holds, or will hold.
        folder: must exist.
    """
    config = {
        "format": FORMAT,
        "kind": critic.kind,
        "objectives": list(critic.objectives),
        "settings": critic.settings(),
        "policy": critic.fingerprint.to_json(),
        "calibration": critic.calibration.to_json() if critic.calibration is not None else None,
        "about": critic.about,
    }
    write_json(folder / CONFIG, config)
    try:
        card = model_card(critic)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # `about` is anybody's to fill, also on the hub; what took hours to train is not lost over its card.
        warnings.warn(
            f"the critic is saved without a new model card, since its `about` cannot be told: {error!r}",
            UserWarning,
            stacklevel=4,
        )
        return
    with atomic_file(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")


def load_critic(folder: str | os.PathLike[str], *, revision: str | None = None) -> Critic:
    """Read a critic folder; its `config.json` says which kind of critic it is.

    Args:
        folder: what `Critic.save` wrote; or, as a string, the `owner/name` on the hub of what `Critic.push_to_hub`
            uploaded, if there is no such folder here.
        revision: branch, tag or commit on the hub; None is the default branch.

    Returns:
        The critic on the CPU, attached to nothing.

    Raises:
        CriticError: if the folder is missing here and on the hub, is no critic folder, holds a pickle where safetensors
            belong, or is corrupt or truncated; MissingPackageError if its trunk has adapters and peft is not installed.
    """
    path = Path(folder)
    if isinstance(folder, str) and is_hub_id(folder):
        path = fetch_critic(folder, [CONFIG, WEIGHTS], revision)
    critic = _build(path)
    _load_weights(critic, path)
    return critic.eval()


def describe_critic(folder: str | os.PathLike[str]) -> Critic:
    """Read what a critic folder says of its critic, and none of its weights.

    Args:
        folder: what `Critic.save` wrote.

    Returns:
        The critic on the meta device: objectives, fingerprint, calibration, normalisation and range are there, and it
        can neither tilt nor be attached.

    Raises:
        CriticError: as `load_critic`.
    """
    path = Path(folder)
    with torch.device("meta"):
        critic = _build(path)
    _stored(path)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as tensors:
            for name in ("reward_mean", "reward_std", "trained_up_to"):
                setattr(critic, name, tensors.get_tensor(name))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _corrupt(path / WEIGHTS, error) from error
    return critic.eval()


def _build(path: Path) -> Critic:
    """Make the critic that a folder's configuration describes, without its weights."""
    config = _read_config(path)
    kinds: dict[str, Callable[..., Critic]] = {known.kind: known for known in (HiddenStateCritic, ValueModelCritic)}
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise CriticError(f"folder {str(path)!r} holds a critic of kind {kind!r}.", closest(str(kind), kinds))
    try:
        critic = kinds[kind](config["objectives"], Fingerprint(**config["policy"]), **config["settings"])
        if config.get("calibration") is not None:
            critic.calibration = Calibration(**config["calibration"])
        critic.about = dict(config.get("about") or {})  # critics of earlier versions tell nothing about themselves
    except MissingPackageError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, CriticError) as error:
        raise _corrupt(path / CONFIG, error) from error
    return critic


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CriticError(f"folder is {str(path)!r}, which does not exist.", "train a critic first: mavis train.")
    if not (path / CONFIG).is_file():
        raise CriticError(
            f"folder {str(path)!r} has no {CONFIG}, so it is not a critic.",
            f"name the folder that Critic.save wrote; it holds {CONFIG} and {WEIGHTS}.",
        )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _corrupt(path / CONFIG, error) from error
    if not isinstance(config, dict) or "kind" not in config or "format" not in config:
        raise CriticError(
            f"{str(path / CONFIG)!r} is the configuration of something else than a critic.",
            "name the folder that Critic.save wrote.",
        )
    if config["format"] != FORMAT:
        raise CriticError(
            f"folder {str(path)!r} has critic format {config['format']!r}; this version reads {FORMAT}.",
            "install the version of mavis that wrote it.",
        )
    return config


def _stored(path: Path) -> None:
    """Refuse a folder without weights."""
    if not (path / WEIGHTS).is_file():
        raise CriticError(
            f"folder {str(path)!r} has no {WEIGHTS}{pickles_in(path)}.", "save the critic again with Critic.save."
        )


def _load_weights(critic: Critic, path: Path) -> None:
    _stored(path)
    try:
        tensors = load_file(path / WEIGHTS)
        critic.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _corrupt(path / WEIGHTS, error) from error


def _corrupt(path: Path, error: Exception) -> CriticError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return CriticError(f"{str(path)!r} is corrupt or truncated: {first_line}", "copy or train the critic again.")
