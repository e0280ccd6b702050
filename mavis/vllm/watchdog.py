"""Kills an engine's processes once the process that started them has ended, and deletes its folder.

Usage: python watchdog.py FOLDER, run by path as a process of its own. It reads process identities from standard input,
whose end means that the parent has exited, however that happened.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable

import psutil


def process_identity(process: psutil.Process) -> str:
    """Identify a process by its id and start time, since ids are reused."""
    return f"{process.pid} {process.create_time()}"


def main(folder: str, identities: Iterable[str]) -> None:
    """Read process identities to the end, then kill those processes with their children and delete a folder."""
    for identity in list(identities):
        with contextlib.suppress(psutil.Error):  # it has ended already
            process = psutil.Process(int(identity.split()[0]))
            if process_identity(process) == identity.strip():
                for one in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        one.kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin)
