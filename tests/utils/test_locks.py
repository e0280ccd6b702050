"""Locks on folders: who is kept out, who is named, and what a killed process leaves."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mavis.errors import DataError
from mavis.utils.locks import LOCK, locked_folder
from tests.lock_holder import locked_elsewhere

pytest.importorskip("fcntl")


def test_a_second_run_is_told_which_process_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path) as other:
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


def test_a_thread_gets_in_again_and_the_last_block_releases(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    first, second = locked_folder(folder), locked_folder(folder)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (folder / LOCK).is_file()
    with pytest.raises(RuntimeError, match="half way"), locked_folder(folder):
        raise RuntimeError("half way")
    with locked_folder(folder, hold=False):
        assert (folder / LOCK).is_file()
    second.__exit__(None, None, None)
    assert not folder.exists()


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def enter(folder: Path) -> AbstractContextManager[None]:
    block = locked_folder(folder)
    block.__enter__()
    return block


def test_other_threads_of_the_process_are_kept_out_until_the_one_that_holds_it_has_ended(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(DataError, match="in use by another thread of this process"):
        in_thread(lambda: enter(tmp_path))
    left_open = in_thread(lambda: enter(tmp_path))
    with locked_folder(tmp_path):
        left_open.__exit__(None, None, None)
        assert (tmp_path / LOCK).is_file()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_removed_while_locked_can_be_locked_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    left_open = enter(folder)
    shutil.rmtree(folder)
    with locked_elsewhere(folder):
        left_open.__exit__(None, None, None)
        assert (folder / LOCK).is_file()
        with pytest.raises(DataError, match="in use by process"), locked_folder(folder):
            pass


def test_a_folder_that_its_last_run_removes_in_between_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, open_file, removals = tmp_path / "run", os.open, iter(range(3))

    def open_late(path: Any, *arguments: Any) -> int:
        if next(removals, None) is not None:
            folder.rmdir()
        return open_file(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    with locked_folder(folder):
        assert (folder / LOCK).is_file()


def test_one_that_waits_gets_in_when_the_other_has_ended(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with locked_elsewhere(tmp_path):
            waiting = pool.submit(lambda: locked_folder(tmp_path, wait=True).__enter__())
            time.sleep(0.2)
            assert not waiting.done()
        waiting.result()


def test_a_damaged_lock_file_neither_blocks_nor_crashes(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"\xff{" * 1000)
    with locked_elsewhere(tmp_path):
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
