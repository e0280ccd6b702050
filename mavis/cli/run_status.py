"""The status of a run within a sweep: whether it is in one, and the error that it leaves in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from mavis.utils.files import write_json

ERROR_FILE = "error.json"
"""The file in a run's folder that says why the run failed; the next attempt removes it."""


class RunError(CompactHydraException):
    """One run of a sweep has failed; the others continue, and Hydra raises the first such error at the end.

    Args:
        message: the reason, in one line. A single argument, so that it survives pickling by the launchers.
    """


def in_sweep() -> bool:
    """Return whether the current Hydra run is one of a sweep."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def run_label() -> str | None:
    """Name the run if other runs of a sweep may share its terminal; None if it has the terminal to itself."""
    if not in_sweep():
        return None
    config: Any = HydraConfig.get()
    serial = str(config.launcher.get("_target_", "BasicLauncher")).endswith("BasicLauncher")
    return None if serial else Path(config.runtime.output_dir).name


def clear_error() -> None:
    """Remove the error that an earlier attempt at this run left in its folder."""
    if HydraConfig.get().output_subdir is not None:  # otherwise the folder is not a run's
        _error_path().unlink(missing_ok=True)


def record_error(message: str) -> RunError:
    """Write an error to the folder of this run of a sweep, and return the exception that ends the run."""
    write_json(_error_path(), {"error": message})
    return RunError(f"mavis: {message}")


def _error_path() -> Path:
    return Path(HydraConfig.get().runtime.output_dir) / ERROR_FILE
