"""Ends an engine whose trainer is gone, however it went, and clears its folder; run by path, as a process of its own.

python guard.py MARK FOLDER     waits until standard input ends, which it does with the process that started this one
"""

import shutil
import sys
import time

import psutil

MARK = "MAVIS_SAMPLER"
"""Name of the environment variable by which the engine's processes are known."""


def main(mark: str, folder: str) -> None:
    """Wait, then kill all processes with a mark, and remove a folder."""
    sys.stdin.read()
    while _kill(mark):
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _kill(mark: str) -> int:
    killed = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                killed += 1
        except psutil.Error:  # it is gone, or another user's
            continue
    return killed


if __name__ == "__main__":
    main(*sys.argv[1:])
