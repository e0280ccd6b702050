"""What a reward model's checkpoint says of what it was trained to read."""

from __future__ import annotations

from typing import Any

from mavis.errors import ObjectiveError, check_number, check_whole

CONFIG_KEY = "mavis_reward"
"""The entry of a checkpoint's config.json that says what `train_reward_model` trained it to read."""

_DAMAGED = "take out that entry, or copy config.json anew from where the model was trained."


def trained_with(model: Any) -> dict[str, Any]:
    """Return what `train_reward_model` wrote into a checkpoint's config; nothing for all others.

    Args:
        model: of transformers, with its config.

    Returns:
        Some of `template`, `max_length` and `length_penalty`.

    Raises:
        ObjectiveError: if it has been changed to what cannot be.
    """
    trained = getattr(model.config, CONFIG_KEY, None) or {}
    if not isinstance(trained, dict):
        raise ObjectiveError(f"{CONFIG_KEY} in config.json is {trained!r}, expected a mapping.", _DAMAGED)
    if "max_length" in trained:
        check_whole(ObjectiveError, _DAMAGED, **{f"{CONFIG_KEY}.max_length in config.json": trained["max_length"]})
    if "length_penalty" in trained:
        penalty = trained["length_penalty"]
        check_number(ObjectiveError, _DAMAGED, **{f"{CONFIG_KEY}.length_penalty in config.json": penalty})
    return trained
