"""A group of processes, and the collective operations between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mavis.errors import ProcessError

Item = TypeVar("Item")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one job, which share an output folder.

    Args:
        rank: of this process, 0 ≤ rank < world_size; process 0 is the main one, which alone writes results and reports.
        world_size: number of processes.
        device: holds the tensors that are sent and received.

    Examples:
        >>> from mavis.distributed import ProcessGroup
        >>> ProcessGroup(rank=1, world_size=3).shard(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def shard(self, items: Sequence[Item], before: int = 0) -> Sequence[Item]:
        """Select this process's items; the shards of all processes hold each item once.

            item i goes to the process of rank (before + i) mod world_size

        Args:
            items: the same in every process.
            before: the number of items that earlier calls distributed.
        """
        return items[(self.rank - before) % self.world_size :: self.world_size]

    def barrier(self) -> None:
        """Wait until every process has reached this call.

        Raises:
            ProcessError: if another process has stopped.
        """
        self.all_reduce_sum(torch.zeros(1))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, Σ_r values_r.

        Args:
            values: of one shape in every process, on any device.

        Returns:
            The same sum in every process, on the device of `values`.

        Raises:
            ProcessError: if another process has stopped.
        """
        if self.world_size == 1:
            return values
        from accelerate.utils import reduce

        with self.collective():
            summed: Tensor = reduce(values.to(self.device), "sum").to(values.device)
        return summed

    def broadcast_from_main(self, values: Tensor) -> Tensor:
        """Return the main process's values in every process, such as what it sees on disk.

        Args:
            values: of one shape in every process.

        Raises:
            ProcessError: if another process has stopped.
        """
        return self.all_reduce_sum(values if self.is_main else torch.zeros_like(values))

    def check_shared_path(self, path: Path) -> None:
        """Check that this process sees a file that the main one has written.

        Raises:
            ProcessError: if the file is not there.
        """
        if not path.exists():
            raise ProcessError(
                f"process {self.rank} does not see {str(path)!r}, which process 0 has written.",
                "put the output folder on a disk that all machines share.",
            )

    def check_agreement(self, what: str, content: Any) -> None:
        """Check that `content` is the same in every process.

        Args:
            what: the name of the content in the error.
            content: JSON-serialisable.

        Raises:
            ProcessError: in every process, if the content of any differs; or if one has stopped.
        """
        if self.world_size == 1:
            return
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.int64)
        differs = torch.zeros(self.world_size, dtype=torch.int64)
        differs[self.rank] = int(not torch.equal(self.broadcast_from_main(mine), mine))
        others = self.all_reduce_sum(differs).nonzero()[:, 0].tolist()
        if others:
            raise ProcessError(
                f"process {others[0]} has a different {what} than process 0.",
                "start all processes with the same arguments, on machines that see the same files.",
            )

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Turn a communication failure within the block into an error of one line.

        Raises:
            ProcessError: if another process has stopped.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise ProcessError(
                    f"process {self.rank} of {self.world_size} lost another process, which stopped or hangs.",
                    "that process's own message says why; finished work is kept, so rerun the command to resume.",
                ) from error
            raise


SINGLE_PROCESS = ProcessGroup()
"""The group of a process that was started alone."""
