"""Atomic writes, JSON, and the manifests that keep different runs out of one folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mavis.errors import DataError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends without an exception."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an exception.

    A folder already at `path` is moved aside first and removed last; a failure in between restores it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        try:
            if target.exists():
                os.replace(target, aside / "old")
            os.replace(temporary, target)
        except BaseException:
            if not target.exists() and (aside / "old").exists():
                os.replace(aside / "old", target)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file to disk before it is renamed: some disks report only then that they are full."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def matches_manifest(path: str | os.PathLike[str], manifest: Mapping[str, Any], holds: str) -> bool:
    """Compare a folder's manifest with that of the run that wants to use it, so that two runs never mix in one folder.

    Args:
        path: the manifest, a JSON file in the folder; it is not written here.
        manifest: identifies the run, JSON-serialisable.
        holds: what the folder holds if they differ, up to the names of the keys, such as `a run with different`.

    Returns:
        True if they are equal, False if there is no manifest yet.

    Raises:
        DataError: if they differ; names the keys.
    """
    path = Path(path)
    if not path.is_file():
        return False
    found = read_json(path)
    if found != manifest:
        raise DataError(
            f"folder {str(path.parent)!r} holds {holds} {', '.join(_differing_keys(found, manifest))}.",
            "name a new output folder, or repeat the command exactly to resume.",
        )
    return True


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
