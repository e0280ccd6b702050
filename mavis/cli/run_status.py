"""What a run does otherwise when it is one of a sweep: it fails alone, and leaves word of it in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from mavis.utils.files import write_json

ERROR = "error.json"
"""The file in a run's folder that tells why the run failed; the next attempt takes it away."""


class RunError(CompactHydraException):
    """One run of a sweep has failed; the others go on, and Hydra tells of the first at the end.

    Args:
        said: why, in a line. One text alone, so that it comes back whole from another process.
    """


def in_sweep() -> bool:
    """Say whether the process's current Hydra run is one of a sweep."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def side_by_side() -> bool:
    """Say whether other runs of the sweep may write to the same terminal."""
    launcher: Any = HydraConfig.get().launcher if in_sweep() else {}
    return not str(launcher.get("_target_", "BasicLauncher")).endswith("BasicLauncher")


def begin_run() -> None:
    """Forget how an earlier attempt at this run failed, be it one of a sweep or by itself."""
    if HydraConfig.get().output_subdir is not None:  # else its folder is no run's
        _marker().unlink(missing_ok=True)


def fail_run(said: str) -> RunError:
    """Leave word of a failure in the folder of this run of a sweep, and make the error that ends it."""
    write_json(_marker(), {"error": said})
    return RunError(f"mavis: {said}")


def _marker() -> Path:
    return Path(HydraConfig.get().runtime.output_dir) / ERROR
