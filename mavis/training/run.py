"""The folder of a training run: what it was begun with, so that it can go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mavis.critics import load_critic
from mavis.critics.headed import HeadedCritic
from mavis.files import claimed, write_json

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def begin(folder: Path, critic: HeadedCritic, claim: Mapping[str, Any]) -> None:
    """Claim a folder for a run and keep the start there; in a folder that is claimed already, go back to its start.

    Args:
        folder: of the run.
        critic: the start; it may have been trained in place when the run broke off.
        claim: what the run is made of, plain data.

    Raises:
        DataError: if the folder belongs to a run with another claim; names the parts that differ.
    """
    if claimed(folder / "run.json", claim, "a run with other"):
        adopt(critic, folder / "start")
        return
    critic.save(folder / "start")
    write_json(folder / "run.json", claim)


def adopt(critic: HeadedCritic, folder: Path) -> None:
    """Make a critic's numbers those of a critic folder of the same kind and sizes."""
    critic.load_state_dict(load_critic(folder).state_dict())
