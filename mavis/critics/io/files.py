"""The files of a critic folder, and what has to be known of a critic to write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from mavis.critics.calibration import Calibration
from mavis.critics.trained_decoding import TrainedDecoding
from mavis.errors import CriticError
from mavis.policies.fingerprint import Fingerprint

FORMAT = 2
"""Of the folders that are written; format 1 (mavis 0.1) named one tensor differently, and is read as well."""

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class SavableCritic(Protocol):
    """What a critic folder is written from."""

    kind: ClassVar[str]
    objectives: tuple[str, ...]
    composition: Any
    fingerprint: Fingerprint
    calibration: Calibration | None
    decoding: TrainedDecoding | None
    about: dict[str, Any]
    reward_mean: Tensor
    reward_std: Tensor

    def settings(self) -> dict[str, Any]:
        """Return the constructor's own arguments as plain data."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors by name."""
        ...


def corrupt(path: Path, error: Exception) -> CriticError:
    """Make the error for a file that cannot be read."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return CriticError(f"{str(path)!r} is corrupt or truncated: {first_line}", "copy or train the critic again.")
