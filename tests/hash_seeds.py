"""Running code in processes that order sets differently, to see that what it prints is the same in all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def printed_under_hash_seeds(code: str, folder: Path) -> set[str]:
    """Run code in two processes with different hash seeds, in which modules of a folder can be imported.

    Returns:
        What they print: one text if both print the same.
    """
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
