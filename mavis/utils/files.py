"""Atomic writes, JSON, and the manifests that keep different runs out of one folder."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mavis.errors import DataError, first_sentence


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends without an exception."""
    target = Path(path)
    with _temporary(target, is_folder=False) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # the block may have replaced it with a private one
        _sync(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an exception.

    A folder already at `path` is exchanged with the new one in one step. Where the system cannot do that, it is moved
    aside first, and `restore_folder` puts it back if the process is killed in between.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()
    with _temporary(target, is_folder=True) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        for entry in temporary.rglob("*"):
            if entry.is_file():
                entry.chmod(mode & 0o666)  # safetensors and temporary files are private
                _sync(entry)
        if not target.exists():
            os.replace(temporary, target)
        elif not _exchange(temporary, target):
            _replace_in_two_steps(temporary, target)
        _sync_folder(target.parent)


def restore_folder(path: str | os.PathLike[str]) -> None:
    """Put back a folder that a process had moved aside to replace it when it was killed; call it before reading.

    Args:
        path: where the folder should be; nothing happens if it is there, or if nothing was moved aside.
    """
    target = Path(path)
    if target.exists() or not target.parent.is_dir():
        return
    for entry in target.parent.iterdir():
        if (found := _LEFTOVER.fullmatch(entry.name)) and found["aside"] and found["name"] == target.name:
            _sweep_up(entry)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    Those of running processes stay. Whether a process of another machine runs cannot be seen, nor of this one before
    it was restarted, so what it left stays for a day; a folder that it had moved aside is put back after a minute.
    """
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            _sweep_up(entry)


_LEFTOVER = re.compile(
    r"\.mavis-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-(?P<aside>old-)?[0-9a-f]{8}\.(?P<name>.+)", re.DOTALL
)
_PATIENCE, _PATIENCE_ASIDE = 24 * 3600.0, 60.0  # seconds; moving aside and replacing takes an instant
_in_use: set[str] = set()
"""Names of the temporary files and folders of this process."""


@contextmanager
def _temporary(target: Path, *, is_folder: bool, aside: str = "") -> Iterator[Path]:
    """Create a temporary file or folder beside a target, named for its owner, and remove what is left of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    name = f".mavis-{_machine()}-{os.getpid()}-{aside}{secrets.token_hex(4)}.{target.name}"
    temporary = target.parent / name
    _in_use.add(name)
    try:
        if is_folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        yield temporary
    finally:
        _remove(temporary)
        _in_use.discard(name)


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    with _temporary(target, is_folder=True, aside="old-") as aside:
        os.replace(target, aside / "old")
        try:
            os.replace(temporary, target)
        except BaseException:
            os.replace(aside / "old", target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; returns False if the system or its disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _machine() -> str:
    """Identify this machine since it started, or this container: where a process number means the same process."""
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    containers = os.readlink(namespace) if namespace.is_symlink() else ""
    # Host names repeat, and the first namespace has the same number everywhere.
    started = boot.read_text() if boot.is_file() else ""
    return hashlib.sha256(f"{socket.gethostname()} {containers} {started}".encode()).hexdigest()[:8]


def _sweep_up(entry: Path) -> None:
    """Remove what a killed process left, or put back the folder that it had moved aside."""
    found = _LEFTOVER.fullmatch(entry.name)
    assert found is not None
    with suppress(OSError):  # another process sweeps too, or the folder is read-only
        patience = _PATIENCE_ASIDE if found["aside"] else _PATIENCE
        if not _is_abandoned(entry, found["machine"], int(found["process"]), patience):
            return
        if found["aside"] and not (entry.parent / found["name"]).exists() and (entry / "old").exists():
            os.replace(entry / "old", entry.parent / found["name"])
        _remove(entry)


def _is_abandoned(entry: Path, machine: str, process: int, patience: float) -> bool:
    if machine == _machine() and os.name == "posix":
        return entry.name not in _in_use if process == os.getpid() else not is_running(process)
    return time.time() - entry.stat().st_mtime > patience


def is_running(process: int) -> bool:
    """Whether this machine runs a process of this number; only on systems with POSIX signals."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file to disk before it is renamed: some disks report only then that they are full."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, where the system can."""
    with suppress(OSError):
        _sync(folder)


PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
"""Suffixes of files that may be pickles, which are never read."""


def describe_pickles(folder: Path) -> str:
    """Describe the pickles in a folder, to append to an error about a missing file; empty if there are none."""
    found = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES))
    return f"; it holds {found}, which is never read because loading a pickle can run code" if found else ""


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON atomically; NaN and infinities raise ValueError."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """Read one JSON document.

    Args:
        path: of the file.
        strict: whether to refuse NaN and infinities, which `write_json` never writes.

    Raises:
        DataError: if the file is damaged; names it.
    """

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)) and strict:
            raise ValueError(f"it holds the number {text[:20]}")
        return value

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as error:  # damaged JSON, UTF-8 or numbers
        raise DataError(
            f"{str(path)!r} is damaged: {first_sentence(error)}.",
            "if a run wrote it, delete it and rerun the command; otherwise copy it again.",
        ) from error


def matches_manifest(path: str | os.PathLike[str], manifest: Mapping[str, Any], holds: str) -> bool:
    """Compare a folder's manifest with that of the run that wants to use it, so that two runs never mix in one folder.

    Args:
        path: the manifest, a JSON file in the folder; it is not written here.
        manifest: identifies the run, JSON-serialisable.
        holds: what the folder holds if they differ, up to the names of the keys, such as `a run with different`.

    Returns:
        True if they are equal; False if there is no manifest yet, or only that of a run which ended before it had any
        results.

    Raises:
        DataError: if they differ; names the keys.
    """
    path = Path(path)
    if not path.is_file():
        return False
    found = read_json(path)
    if found != manifest:
        if not has_results(path.parent):
            return False
        raise DataError(
            f"folder {str(path.parent)!r} holds {holds} {', '.join(_differing_keys(found, manifest))}.",
            "name a new output folder, or repeat the command exactly to resume.",
        )
    return True


def refuse_model_folder(folder: Path) -> None:
    """Refuse to run in the folder of a critic or a model: whatever else lies there is lost when that is written anew.

    Args:
        folder: in which a run is to be started.

    Raises:
        DataError: if it holds one.
    """
    if (folder / "config.json").is_file():
        raise DataError(
            f"folder {str(folder)!r} holds a critic or a model; a run in it would be lost when that is written again.",
            "name a new output folder.",
        )


def has_results(folder: Path) -> bool:
    """Whether a run has finished anything in its folder: a shard of rollouts, a checkpoint or a report."""
    return any(
        entry.name.startswith("shard-") or entry.name in ("checkpoint", "report.json") for entry in folder.rglob("*")
    )


def _differing_keys(found: Mapping[str, Any], manifest: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the keys whose values differ, with dotted paths for nested mappings."""
    keys: list[str] = []
    for key in {**found, **manifest}:
        one, other = found.get(key), manifest.get(key)
        if isinstance(one, dict) and isinstance(other, Mapping):
            keys += _differing_keys(one, other, f"{prefix}{key}.")
        elif one != other:
            keys.append(f"{prefix}{key}")
    return keys
