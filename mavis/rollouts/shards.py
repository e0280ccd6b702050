"""Shards of rollouts on disk: reading and writing one, and having the missing ones written by all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mavis.distributed import ProcessGroup
from mavis.errors import DataError
from mavis.utils.files import atomic_folder, read_json, write_json

CHECKSUMS = "sha256.json"
"""The file of a shard that holds the checksums of the others by name."""


def store_missing(
    paths: Sequence[Path],
    store: Callable[[int], None],
    processes: ProcessGroup,
    report_progress: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Have each missing shard stored by one process, and yield the indices of all shards in order.

    A single process stores each shard just before it yields its index. Several processes first store the missing shards
    between them and then yield all indices.

    Args:
        paths: of the shards; a path that exists is complete.
        store: samples the shard of an index and writes it atomically.
        processes: the group, all of which make this call.
        report_progress: called with the number of shards on disk.

    Raises:
        ProcessError: if another process has stopped.
    """
    report = report_progress or (lambda done: None)
    # One process looks before any writes: all shares must be taken from the same list.
    is_missing = torch.tensor([not exists for exists in _exist(paths)], dtype=torch.uint8)
    missing = processes.broadcast_from_main(is_missing).nonzero()[:, 0].tolist()
    mine = processes.shard(missing)
    report(0)
    if processes.world_size > 1:
        for index in mine:
            store(index)
            if processes.is_main:
                report(sum(_exist(paths)))
        processes.barrier()
        mine = []
    for index in range(len(paths)):
        if index in mine:
            store(index)
        yield index
        report(index + 1)


def write_shard(path: Path, columns: Mapping[str, list[Any]]) -> None:
    """Write one shard atomically, as an Arrow dataset with the checksums of its files."""
    import datasets

    with atomic_folder(path) as temporary, _hidden_progress_bars():
        datasets.Dataset.from_dict(columns).save_to_disk(str(temporary))
        write_json(temporary / CHECKSUMS, _checksums(temporary))


def read_shard(path: Path, rows: int) -> Any:
    """Read one shard into memory.

    Args:
        path: its folder.
        rows: how many rows it must have.

    Returns:
        A `datasets.Dataset`.

    Raises:
        DataError: if it is missing, damaged or has another number of rows.
    """
    import datasets

    try:
        _check_files(path)
        shard = datasets.load_from_disk(str(path), keep_in_memory=True)
        if len(shard) != rows:
            raise ValueError(f"it has {len(shard)} rows instead of {rows}.")
    except Exception as error:  # Arrow raises many kinds for a damaged file, and the remedy is the same
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"shard {str(path)!r} cannot be read: {reason}", "delete that folder; it is sampled again."
        ) from error
    return shard


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _check_files(path: Path) -> None:
    """Compare the files of a shard with their checksums; shards of early versions have none."""
    if (path / CHECKSUMS).is_file():
        found = _checksums(path)
        for name, checksum in read_json(path / CHECKSUMS).items():
            if found.get(name) != checksum:
                raise ValueError(f"{name} is damaged or missing")


def _exist(paths: Sequence[Path]) -> list[bool]:
    """Look the paths up in listings of their folders: network disks cache that a single path did not exist."""
    folders = {path.parent for path in paths}
    entries = {entry for folder in folders if folder.is_dir() for entry in folder.iterdir()}
    return [path in entries for path in paths]


@contextmanager
def _hidden_progress_bars() -> Iterator[None]:
    """Hide the progress bars of the datasets library, which would flash up for every shard."""
    import datasets

    were_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()
