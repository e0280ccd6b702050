"""The folder of a training run: what it was begun with, so that it can go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from mavis.critics import Critic
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup
from mavis.rollouts import RolloutPlan
from mavis.training.accelerate_session import check_accelerate
from mavis.utils.files import matches_manifest, read_json, write_json

Report = TypeVar("Report", bound=Any)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def open_run(
    folder: Path,
    critic: HeadCritic,
    prompts: Sequence[str],
    settings: Any,
    processes: ProcessGroup,
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
        ConfigError: if Accelerate is configured for something that a fit does not support.
        ProcessError: if a process runs something else than the others, or one has stopped.
    """
    check_accelerate(torch.device(processes.device))  # before anything is sampled
    claim = {
        "settings": asdict(settings),
        "objectives": list(critic.objectives),
        "critic": critic.settings(),
        "policy": critic.fingerprint.to_json(),
        "prompts": RolloutPlan.reference(prompts, 0).digest(),
        **more,
    }
    processes.check_agreement("run", claim)
    if processes.is_main and not matches_manifest(folder / "run.json", claim, "a run with different"):
        critic.save_pretrained(folder / "start")
        write_json(folder / "run.json", claim)
    processes.barrier()
    processes.check_shared_path(folder / "run.json")
    load_weights(critic, folder / "start")


def load_finished(folder: Path, critic: HeadCritic, processes: ProcessGroup) -> dict[str, Any] | None:
    """Read what `save_finished` has written, if it has, and make the critic the one that lies there.

    Args:
        folder: that `save_finished` was given.
        critic: of the same kind and sizes.
        processes: that ask together; the main one's disk decides for all.

    Returns:
        The report as plain data; None if there is none.
    """
    there = processes.broadcast_from_main(torch.tensor((folder / "report.json").is_file(), dtype=torch.uint8))
    if not there:
        return None
    load_weights(critic, folder / "critic")
    report: dict[str, Any] = read_json(folder / "report.json")
    return report


def save_finished(folder: Path, critic: HeadCritic, report: Report, processes: ProcessGroup) -> Report:
    """Write a critic and then its report, and have every process go on with what was written.

    Machines of different kinds round differently, so what each has come to by itself may differ in its last digits.

    Args:
        folder: takes `critic` and `report.json`.
        critic: to be saved.
        report: a dataclass.
        processes: that have come to it together.

    Returns:
        The report of the main process.

    Raises:
        ProcessError: if another process has stopped.
    """
    if processes.is_main:
        critic.save_pretrained(folder / "critic")
        write_json(folder / "report.json", asdict(report))
    processes.barrier()
    if processes.is_main:
        return report
    load_weights(critic, folder / "critic")
    return type(report)(**read_json(folder / "report.json"))


def load_weights(critic: HeadCritic, folder: Path) -> None:
    """Make a critic's numbers those of a critic folder of the same kind and sizes."""
    critic.load_state_dict(Critic.from_pretrained(folder).state_dict())
