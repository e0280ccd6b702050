"""Locks on folders: who is kept out, who is named, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mavis
from mavis.errors import DataError
from mavis.utils.locks import LOCK, locked_folder

pytest.importorskip("fcntl")

HOLDER = """
import sys, time, types
from pathlib import Path
sys.modules["mavis"] = types.ModuleType("mavis")  # without its imports, which take seconds
sys.modules["mavis"].__path__ = sys.argv[2:]
from mavis.utils.locks import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder."""
    command = [sys.executable, "-c", HOLDER, str(folder), *mavis.__path__]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_which_process_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with hold(tmp_path) as other:
        with pytest.raises(DataError) as raised, locked_folder(tmp_path):
            pass
        assert raised.value.message == (
            f"folder {str(tmp_path)!r} is in use by process {other.pid} on {socket.gethostname()!r}."
        )
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with locked_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_keeps_itself_out_and_releases_on_errors(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(RuntimeError, match="half way"), locked_folder(folder):
        with pytest.raises(DataError, match=f"process {os.getpid()} on"), locked_folder(folder):
            pass
        raise RuntimeError("half way")
    with locked_folder(folder), locked_folder(folder, hold=False):
        assert (folder / LOCK).is_file()
    assert not folder.exists()


def test_a_damaged_lock_file_neither_blocks_nor_crashes(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"\xff{" * 1000)
    with locked_folder(tmp_path):
        (tmp_path / LOCK).write_bytes(b"")
        with pytest.raises(DataError, match="in use by another process"), locked_folder(tmp_path):
            pass


def test_without_locks_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    (tmp_path / "file").write_text("")
    with locked_folder(tmp_path / "file" / "folder"):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", types.SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuse))
    with locked_folder(tmp_path):
        pass
