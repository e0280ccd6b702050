"""Ends an engine whose trainer is gone, however it went, and clears its folder; run by path, as a process of its own.

python guard.py FOLDER     is told of processes on standard input, which ends with the process that started this one
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable

import psutil


def name(process: psutil.Process) -> str:
    """Tell a process from all others, also from later ones of the same number."""
    return f"{process.pid} {process.create_time()}"


def main(folder: str, told: Iterable[str]) -> None:
    """Listen for names of processes, then kill those and what they have started, and remove a folder."""
    for known in list(told):
        with contextlib.suppress(psutil.Error):  # it is gone
            process = psutil.Process(int(known.split()[0]))
            if name(process) == known.strip():
                for one in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        one.kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin)
