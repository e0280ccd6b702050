"""Which process stores which shard, and in what order all see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mavis.distributed import SINGLE_PROCESS, ProcessGroup
from mavis.errors import DataError
from mavis.rollouts.shards import read_shard, store_missing, write_shard


class Others(ProcessGroup):
    """One process of two, whose peer neither sees nor stores anything meanwhile."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"shard-{index}" for index in range(5)]


def storing(paths: list[Path], events: list[object]) -> Callable[[int], None]:
    def store(index: int) -> None:
        paths[index].touch()
        events.append(("stored", index))

    return store


def test_a_single_process_stores_each_shard_when_it_is_its_turn(paths: list[Path]) -> None:
    paths[1].touch()
    events: list[object] = []
    for index in store_missing(paths, storing(paths, events), SINGLE_PROCESS):
        events.append(index)
    assert events == [("stored", 0), 0, 1, ("stored", 2), 2, ("stored", 3), 3, ("stored", 4), 4]


def test_a_process_among_several_stores_its_share_before_any_is_yielded(paths: list[Path]) -> None:
    paths[1].touch()
    events: list[object] = []
    for index in store_missing(paths, storing(paths, events), Others(0, 2)):
        events.append(index)
    assert events == [("stored", 0), ("stored", 3), 0, 1, 2, 3, 4]


def test_progress_counts_the_shards_on_disk(paths: list[Path]) -> None:
    done: list[int] = []
    list(store_missing(paths, storing(paths, []), SINGLE_PROCESS, done.append))
    assert done == [0, 1, 2, 3, 4, 5]


def test_a_shard_comes_back_as_it_was_written(paths: list[Path]) -> None:
    columns = {"prompt": ["a", "b"], "kl": [[0.5], []]}
    write_shard(paths[0], columns)
    assert read_shard(paths[0], 2).to_dict() == columns
    with pytest.raises(DataError, match="it has 2 rows instead of 3. Hint: delete that folder"):
        read_shard(paths[0], 3)
    with pytest.raises(DataError, match="cannot be read"):
        read_shard(paths[1], 2)
