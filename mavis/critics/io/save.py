"""Saving a critic to a folder: config, weights and model card."""

from __future__ import annotations

import os
from pathlib import Path

from mavis.critics.io.files import CARD, CONFIG, FORMAT, WEIGHTS, SavableCritic
from mavis.critics.io.model_card import model_card
from mavis.errors import CriticError, warn_user
from mavis.utils.files import atomic_file, atomic_folder, write_json
from mavis.utils.tensors import save_tensors


def save_critic(critic: SavableCritic, folder: str | os.PathLike[str]) -> None:
    """Write a critic folder, completely or not at all; see `Critic.save_pretrained`.

    Args:
        critic: any critic.
        folder: the target; an existing critic is replaced.

    Raises:
        CriticError: if `folder` holds something other than a critic.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file())):
        raise CriticError(
            f"folder is {str(target)!r}, which exists and is not a critic.",
            "name a new folder, or a critic to replace.",
        )
    with atomic_folder(target) as temporary:
        save_description(critic, temporary)
        save_tensors(critic.state_dict(), temporary / WEIGHTS)


def save_description(critic: SavableCritic, folder: Path) -> None:
    """Write the config and the model card of a critic, but not its weights.

    Args:
        critic: the critic whose weights are in the folder, or will be.
        folder: an existing folder.
    """
    settings = critic.settings()  # raises for a group
    config = {
        "format": FORMAT,
        "kind": critic.kind,
        "objectives": list(critic.objectives),
        "settings": settings,
        "policy": critic.fingerprint.to_json_with_sample(),
        "calibration": critic.calibration.to_json() if critic.calibration is not None else None,
        "decoding": critic.decoding.to_json() if critic.decoding is not None else None,
        "about": critic.about,
    }
    write_json(folder / CONFIG, config)
    try:
        card = model_card(critic)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # `about` may be edited by hand; a critic that took hours to train must not be lost over its card.
        warn_user(f"the critic was saved without a new model card, because its `about` is malformed: {error!r}")
        return
    with atomic_file(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")
