"""The folder of a training run: what it was started with and what is finished, so that it can resume."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from mavis.critics import Critic
from mavis.critics.head_critic import HeadCritic
from mavis.distributed import ProcessGroup
from mavis.errors import CriticError, DataError
from mavis.policies import Prompt
from mavis.rewards import Objective
from mavis.rollouts import RolloutPlan
from mavis.rollouts.manifest import matches_scored_manifest, settings_manifest, write_scored_manifest
from mavis.training.accelerate_session import check_accelerate
from mavis.utils.files import read_json, restore_folder, write_json

Report = TypeVar("Report", bound=Any)
_FOLDER = "folder"  # the field of a report that names the folder of the model

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and its total."""


def open_run(
    folder: Path,
    critic: HeadCritic,
    prompts: Sequence[Prompt],
    settings: Any,
    processes: ProcessGroup,
    *,
    objectives: Mapping[str, Objective],
    raisable: str | None = None,
    **more: Any,
) -> bool:
    """Open the folder of a run: write its manifest and the initial critic, or load these if the run is resumed.

    The main process writes, and all processes start from what it has written.

    Args:
        folder: of the run.
        critic: the initial critic; an interrupted run may have trained it in place. Its fingerprint is the policy's.
        prompts: to sample from.
        settings: a dataclass.
        processes: the group.
        objectives: whose rewards the run stores, by name; empty if it stores none.
        raisable: the setting that may be larger than when the run was started, so that the run goes on.
        more: further entries of the manifest, plain data by name.

    Returns:
        Whether that setting has been raised, in the main process.

    Raises:
        DataError: if the folder belongs to a different run; names the entries of the manifest that differ, or the
            objectives that have changed.
        ConfigError: if Accelerate is configured for something that a fit does not support.
        ProcessError: if the processes run different things, or one has stopped.
    """
    check_accelerate(torch.device(processes.device))  # before anything is sampled
    manifest = {
        "settings": settings_manifest(settings),
        "objectives": list(critic.objectives),
        "critic": critic.settings(),
        "policy": critic.fingerprint.to_json(),
        "prompts": RolloutPlan.reference(prompts, 0).digest(),
        **more,
    }
    processes.check_agreement("run", manifest)
    restore_folder(folder / "start")
    path, raised = folder / "run.json", False
    if processes.is_main:
        found = _with_raised(path, manifest, raisable)
        raised = found != manifest
        resumed = matches_scored_manifest(path, found, objectives, "a run with different")
        if not (resumed and (folder / "start").is_dir()):
            critic.save_pretrained(folder / "start")
            write_scored_manifest(path, manifest, objectives)
        elif raised:
            shutil.rmtree(folder / "calibration", ignore_errors=True)  # of the critic that is improved further
            write_scored_manifest(path, manifest, objectives)
    processes.barrier()
    processes.check_shared_path(path)
    load_weights(critic, folder / "start")
    return raised


def _with_raised(path: Path, manifest: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Return a manifest as it was before the setting `name` was raised; the manifest itself if it was not."""
    stored = read_json(path).get("settings") if name is not None and path.is_file() else None
    before = stored.get(name) if isinstance(stored, dict) else None
    settings = manifest["settings"]
    if not isinstance(before, int) or before >= settings[name]:
        return manifest
    return {**manifest, "settings": {**settings, name: before}}


def load_finished(folder: Path, critic: HeadCritic, kind: type[Report], processes: ProcessGroup) -> Report | None:
    """Load the critic and read the report that `save_finished` wrote, if it did.

    Args:
        folder: that `save_finished` was given.
        critic: of the same kind and sizes; takes the stored weights.
        kind: the dataclass of the report.
        processes: the group; the main process decides for all.

    Returns:
        The report; None if there is none, or no critic.

    Raises:
        DataError: if one of the two is damaged.
    """
    restore_folder(folder / "critic")
    is_finished = (folder / "report.json").is_file() and (folder / "critic").is_dir()
    if not processes.broadcast_from_main(torch.tensor(is_finished, dtype=torch.uint8)):
        return None
    load_weights(critic, folder / "critic")
    return read_report(folder / "report.json", kind)


def write_report(path: Path, report: Any) -> None:
    """Write a report; the folder that it names is stored as it is seen from the report, so that both can be moved.

    Args:
        path: of its JSON file.
        report: a dataclass. Its `folder`, if it has one, is in the folder of that file.
    """
    content = asdict(report)
    if _FOLDER in content:
        content[_FOLDER] = Path(content[_FOLDER]).relative_to(path.parent).as_posix()
    write_json(path, content)


def read_report(path: Path, kind: type[Report]) -> Report:
    """Read a report that `write_report` wrote; a folder that it names is where it is now.

    Args:
        path: of its JSON file.
        kind: its dataclass.

    Raises:
        DataError: if it is damaged.
    """
    content = read_json(path)
    try:
        if _FOLDER in content:
            # It lies in the run; earlier versions wrote where that was, which may have been moved since.
            content[_FOLDER] = str(path.parent / Path(content[_FOLDER]).name)
        return kind(**content)
    except TypeError as error:
        raise DataError(
            f"{str(path)!r} is damaged: it is not a {kind.__name__}.", "delete it and rerun the command."
        ) from error


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
        write_report(folder / "report.json", report)
    processes.barrier()
    if processes.is_main:
        return report
    load_weights(critic, folder / "critic")
    return read_report(folder / "report.json", type(report))


def report_reuse(folder: Path, *, raised: bool = False) -> None:
    """Say on standard error that a finished run is reused: a repeated call takes no time and changes nothing.

    Args:
        folder: of the run.
        raised: whether the call asks for more than the run has finished.
    """
    print(f"finished run in {folder} {'continued' if raised else 'reused'}", file=sys.stderr)


def load_weights(critic: HeadCritic, folder: Path) -> None:
    """Load the weights of a critic folder of a run into a critic of the same kind and sizes.

    Raises:
        DataError: if the folder is damaged.
    """
    try:
        critic.load_state_dict(Critic.from_pretrained(folder).state_dict())
    except (CriticError, RuntimeError) as error:
        reason = error.message.rstrip(".") if isinstance(error, CriticError) else "its sizes are not those of this run"
        raise DataError(
            f"critic {str(folder)!r} cannot be read: {reason}.",
            "delete that folder and rerun the command: it is made again.",
        ) from error
