"""The folder of a training run: what it was begun with, so that it can go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mavis.critics import load_critic
from mavis.critics.headed import HeadedCritic
from mavis.files import claimed, write_json
from mavis.processes import Processes
from mavis.rollouts import Plan
from mavis.training.accelerating import check_sharding

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def begin(
    folder: Path,
    critic: HeadedCritic,
    prompts: Sequence[str],
    settings: Any,
    processes: Processes,
    **more: Any,
) -> None:
    """Claim a folder for a run and keep the start there; in a folder that is claimed already, go back to its start.

    One process writes, and all begin with what it has written.

    Args:
        folder: of the run.
        critic: the start; it may have been trained in place when the run broke off. Its fingerprint is the policy's.
        prompts: to sample from.
        settings: a dataclass.
        processes: that run together.
        more: what else the run is made of, plain data by name.

    Raises:
        DataError: if the folder belongs to a run that is made of something else; names the parts that differ.
        ConfigError: if Accelerate is configured for a way of sharding that is not supported.
        ProcessError: if a process runs something else than the others, or one has stopped.
    """
    check_sharding()  # before anything is sampled
    claim = {
        "settings": asdict(settings),
        "objectives": list(critic.objectives),
        "critic": critic.settings(),
        "policy": critic.fingerprint.to_json(),
        "prompts": Plan.reference(prompts, 0).digest(),
        **more,
    }
    processes.agree("run", claim)
    if processes.main and not claimed(folder / "run.json", claim, "a run with other"):
        critic.save(folder / "start")
        write_json(folder / "run.json", claim)
    processes.wait()
    processes.check_sees(folder / "run.json")
    adopt(critic, folder / "start")


def adopt(critic: HeadedCritic, folder: Path) -> None:
    """Make a critic's numbers those of a critic folder of the same kind and sizes."""
    critic.load_state_dict(load_critic(folder).state_dict())
