"""The files of a critic folder, and the protocol of a critic that can be saved to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from mavis.critics.calibration import Calibration
from mavis.critics.trained_decoding import TrainedDecoding
from mavis.errors import CriticError
from mavis.policies.fingerprint import Fingerprint

FORMAT = 2
"""Version of the folders that are written. Format 1 (mavis 0.1), with another name for one tensor, is still read."""

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class SavableCritic(Protocol):
    """The attributes of a critic that are saved."""

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
        """Return the arguments of the constructor as JSON-compatible data."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors by name."""
        ...


def corrupt_error(path: Path, error: Exception) -> CriticError:
    """Build the error for a file that cannot be read."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return CriticError(
        f"{str(path)!r} is corrupt or truncated: {first_line}", "copy the folder again, or train the critic again."
    )
