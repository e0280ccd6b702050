"""Another process that holds the lock of a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mavis

HOLDER = """
import sys, time, types
from pathlib import Path
sys.modules["mavis"] = types.ModuleType("mavis")  # without its imports, which take seconds
sys.modules["mavis"].__path__ = sys.argv[2:]
from mavis.utils.locks import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def locked_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of a folder in another process while the block runs."""
    command = [sys.executable, "-c", HOLDER, str(folder), *mavis.__path__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()
