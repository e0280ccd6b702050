"""Locks that keep two running processes out of one folder."""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mavis.errors import DataError

LOCK = ".mavis.lock"
"""The file that is locked; it says who holds it."""


@contextmanager
def locked_folder(folder: Path, hold: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs.

    The system releases the lock when the process ends, however it ends. Nothing is locked where the system or the disk
    has no locks, or where the folder cannot be written.

    Args:
        folder: created if it does not exist, and removed at the end if it is empty then.
        hold: False does nothing, for all processes of a group but one.

    Raises:
        DataError: if another run holds the lock; names its process and its machine.
    """
    is_new = not folder.exists()
    handle = _lock(folder) if hold else None
    try:
        yield
    finally:
        if handle is not None:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
            if is_new:  # a run that failed before it wrote anything leaves nothing
                with suppress(OSError):
                    folder.rmdir()


def _lock(folder: Path) -> int | None:
    """Open and lock the file of a folder; None if that is impossible here."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # not POSIX
        return None
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # read-only, or not a folder: what the run itself does next says so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return None
            raise DataError(
                f"folder {str(folder)!r} is in use by {_owner(path)}.",
                "wait until it has ended, or name another output folder.",
            ) from error
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)  # its last owner has removed the file in between
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
    return handle


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(owner['process'])} on {str(owner['machine'])!r}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just opened or removed the file
        return "another process"
