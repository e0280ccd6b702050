"""Writing a critic folder: its configuration, its weights and its model card, whole or not at all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from safetensors.torch import save_file

from mavis.critics.io.files import CARD, CONFIG, FORMAT, WEIGHTS, SavableCritic
from mavis.critics.io.model_card import model_card
from mavis.errors import CriticError
from mavis.utils.files import atomic_file, atomic_folder, write_json


def save_critic(critic: SavableCritic, folder: str | os.PathLike[str]) -> None:
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
        save_description(critic, temporary)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in critic.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})


def save_description(critic: SavableCritic, folder: Path) -> None:
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
        "decoding": critic.decoding.to_json() if critic.decoding is not None else None,
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
