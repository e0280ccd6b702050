"""Files that are written whole or not at all."""

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
    """Yield a temporary path beside `path` that takes its place when the block ends without an exception."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends without an exception.

    A folder already at `path` is moved aside first and removed last; what breaks in between puts it back.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            if file.is_file():
                _to_disk(file)
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


def _to_disk(path: Path) -> None:
    """Have a file's content written out: some disks say only now that they are full, and it is not renamed yet."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _differing(found: Mapping[str, Any], claim: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the entries that differ, those of nested mappings by their path."""
    names: list[str] = []
    for name in {**found, **claim}:
        one, other = found.get(name), claim.get(name)
        if isinstance(one, dict) and isinstance(other, Mapping):
            names += _differing(one, other, f"{prefix}{name}.")
        elif one != other:
            names.append(f"{prefix}{name}")
    return names


PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
"""The endings of files that may be pickles, which are never read."""


def pickles_in(folder: Path) -> str:
    """Say that a folder without the wanted file holds pickles; nothing if it holds none."""
    found = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES))
    return f"; it holds {found}, which is never read because loading a pickle can run code" if found else ""


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all; NaN and infinities are refused."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def matches_manifest(marker: str | os.PathLike[str], claim: Mapping[str, Any], holds: str) -> bool:
    """Tell whether a folder's marker makes the same claim, so that two different runs never mix in one folder.

    Args:
        marker: a JSON file in the folder; it is not written here.
        claim: what the run that wants to use the folder is made of, plain data.
        holds: what the folder is said to hold where the claims differ, such as `a run with other`.

    Returns:
        False if there is no marker yet.

    Raises:
        DataError: if the marker claims something else; names the parts that differ.
    """
    path = Path(marker)
    if not path.is_file():
        return False
    found = read_json(path)
    if found != claim:
        other = ", ".join(_differing(found, claim))
        raise DataError(
            f"folder {str(path.parent)!r} holds {holds} {other}.",
            "name a new output folder, or repeat the command exactly to resume.",
        )
    return True
