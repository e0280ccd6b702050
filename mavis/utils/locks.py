"""Locks that keep two running processes out of one folder."""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mavis.errors import DataError

LOCK = ".mavis.lock"
"""The file that is locked; it says who holds it."""


@contextmanager
def locked_folder(folder: Path, hold: bool = True, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs.

    The system releases the lock when the process ends, however it ends. Nothing is locked where the system or the disk
    has no locks, or where the folder cannot be written.

    A thread that holds the lock gets in again, so that an iterator left suspended does not keep out its own program;
    the folder is released when the last of its blocks ends.

    Args:
        folder: created if it does not exist, and then, or if `wait`, removed at the end if it is empty.
        hold: False does nothing, for all processes of a group but one.
        wait: until the other run has ended, instead of raising.

    Raises:
        DataError: if another run holds the lock; names its process and its machine.
    """
    held = _enter(folder, wait) if hold else None
    try:
        yield
    finally:
        if held is not None:
            _leave(held)


@dataclass(eq=False)
class _Held:
    """A lock of this process, with the number of blocks that hold it."""

    folder: Path
    handle: int
    is_new: bool
    blocks: int = 1
    process: int = field(default_factory=os.getpid)
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def is_in_place(self) -> bool:
        """Whether the file of the folder is still the one that was locked, and by this process, not by its parent."""
        return self.process == os.getpid() and _is_same(self.folder / LOCK, self.handle)


_held: list[_Held] = []
_guard = threading.RLock()  # re-entered when a suspended iterator is collected as garbage


def _enter(folder: Path, wait: bool) -> _Held | None:
    """Lock a folder, or count one block more where this thread, or one that has ended, holds it already."""
    with _guard:
        for held in _held:
            if held.folder == folder.resolve() and held.is_in_place():
                if held.thread is threading.current_thread() or not held.thread.is_alive():
                    held.thread = threading.current_thread()
                    held.blocks += 1
                    return held
                if not wait:
                    raise DataError(
                        f"folder {str(folder)!r} is in use by another thread of this process.",
                        "wait until it has ended, close the iterator that it left open, or name another output folder.",
                    )
    is_new = wait or not folder.exists()  # the run that is waited for may have created it
    handle = _lock(folder, wait)
    if handle is None:
        return None
    with _guard:
        _held.append(_Held(folder.resolve(), handle, is_new))
        return _held[-1]


def _leave(held: _Held) -> None:
    with _guard:
        held.blocks -= 1
        if held.blocks:
            return
        _held.remove(held)
        if held.is_in_place():
            (held.folder / LOCK).unlink(missing_ok=True)
        os.close(held.handle)
        if held.is_new:  # a run that failed before it wrote anything leaves nothing
            with suppress(OSError):
                held.folder.rmdir()


def _lock(folder: Path, wait: bool) -> int | None:
    """Open and lock the file of a folder; None if that is impossible here."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # not POSIX
        return None
    path = folder / LOCK
    tries = 100
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):  # its last owner has removed the folder in between
            tries -= 1
            if not tries:  # a file, or a link to nothing
                return None
            time.sleep(0.001)
            continue
        except OSError:  # read-only, or in a file: what the run itself does next says so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return None
            raise DataError(
                f"folder {str(folder)!r} is in use by {_owner(path)}.",
                "wait until it has ended, or name another output folder.",
            ) from error
        except BaseException:  # interrupted while it waits
            os.close(handle)
            raise
        if _is_same(path, handle):
            break
        os.close(handle)  # its last owner has removed the file in between
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
    return handle


def _is_same(path: Path, handle: int) -> bool:
    """Whether a path still names the file that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(owner['process'])} on {str(owner['machine'])!r}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just opened or removed the file
        return "another process"
