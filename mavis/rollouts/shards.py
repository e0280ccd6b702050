"""Shards of sampled responses: which are missing, and which process samples which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mavis.distributed import ProcessGroup


def store_missing(
    paths: Sequence[Path],
    store: Callable[[int], None],
    processes: ProcessGroup,
    tell: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Have every missing shard stored by one process, and yield the number of each as it is on disk, in order.

    A process alone goes on from one to the next as it is asked. Several share the missing ones out among them and yield
    nothing until the last is there, for whoever asks wants all of them.

    Args:
        paths: of the shards, whole where they exist.
        store: samples the shard of a number and writes it, whole or not at all.
        processes: that call this together.
        tell: told how many shards are on disk, as they come.

    Raises:
        ProcessError: if another process has stopped.
    """
    say = tell or (lambda done: None)
    # One process looks, before any writes: all shares must be cut from the same list.
    missing = processes.broadcast_from_main(torch.tensor([not there for there in _on_disk(paths)], dtype=torch.uint8))
    mine = processes.shard(missing.nonzero()[:, 0].tolist())
    say(0)
    if processes.world_size > 1:
        for index in mine:
            store(index)
            if processes.is_main:
                say(sum(_on_disk(paths)))
        processes.barrier()
        mine = []
    for index in range(len(paths)):
        if index in mine:
            store(index)
        yield index
        say(index + 1)


def _on_disk(paths: Sequence[Path]) -> list[bool]:
    """Tell which paths are there, by reading their folders: a disk shared over a network remembers names it lacked."""
    there = {entry for folder in {path.parent for path in paths} if folder.is_dir() for entry in folder.iterdir()}
    return [path in there for path in paths]
