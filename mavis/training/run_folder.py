"""The folder of a training run: what it was started with and what is finished, so that it can resume."""

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
"""Called with a stage, how much of it is done, and its total."""


def open_run(
    folder: Path,
    critic: HeadCritic,
    prompts: Sequence[str],
    settings: Any,
    processes: ProcessGroup,
    **more: Any,
) -> None:
    """Open the folder of a run: write its manifest and the initial critic, or load these if the run is resumed.

    The main process writes, and all processes start from what it has written.

    Args:
        folder: of the run.
        critic: the initial critic; an interrupted run may have trained it in place. Its fingerprint is the policy's.
        prompts: to sample from.
        settings: a dataclass.
        processes: the group.
        more: further entries of the manifest, plain data by name.

    Raises:
        DataError: if the folder belongs to a different run; names the entries of the manifest that differ.
        ConfigError: if Accelerate is configured for something that a fit does not support.
        ProcessError: if the processes run different things, or one has stopped.
    """
    check_accelerate(torch.device(processes.device))  # before anything is sampled
    manifest = {
        "settings": asdict(settings),
        "objectives": list(critic.objectives),
        "critic": critic.settings(),
        "policy": critic.fingerprint.to_json(),
        "prompts": RolloutPlan.reference(prompts, 0).digest(),
        **more,
    }
    processes.check_agreement("run", manifest)
    if processes.is_main and not matches_manifest(folder / "run.json", manifest, "a run with different"):
        critic.save_pretrained(folder / "start")
        write_json(folder / "run.json", manifest)
    processes.barrier()
    processes.check_shared_path(folder / "run.json")
    load_weights(critic, folder / "start")


def load_finished(folder: Path, critic: HeadCritic, processes: ProcessGroup) -> dict[str, Any] | None:
    """Load the critic and read the report that `save_finished` wrote, if it did.

    Args:
        folder: that `save_finished` was given.
        critic: of the same kind and sizes; takes the stored weights.
        processes: the group; the main process decides for all.

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
    """Write a critic and then its report, and let every process continue with what was written.

    Machines of different kinds round differently, so the processes' own results may differ in the last digits.

    Args:
        folder: takes `critic` and `report.json`.
        critic: to be saved.
        report: a dataclass.
        processes: the group.

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
    """Load the weights of a critic folder into a critic of the same kind and sizes."""
    critic.load_state_dict(Critic.from_pretrained(folder).state_dict())
