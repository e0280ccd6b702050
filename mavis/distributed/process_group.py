"""The processes that a launcher started together, and the place of this one among them."""

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
    """The processes of one job, which share a folder and nothing else.

    Args:
        rank: of this process, 0 ≤ rank < world_size; process 0 is the main one, which alone writes and speaks.
        world_size: number of processes.
        device: where tensors are sent from and arrive.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def shard(self, items: Sequence[Item], before: int = 0) -> Sequence[Item]:
        """Take this process's share: every `world_size`-th item. All shares together hold each item once.

        Args:
            items: the same in every process; item i of them is number before + i of all, and goes to the process whose
                index that is modulo `world_size`.
            before: how many items earlier calls have shared out.
        """
        return items[(self.rank - before) % self.world_size :: self.world_size]

    def barrier(self) -> None:
        """Wait until every process has come here.

        Raises:
            ProcessError: if one has stopped instead.
        """
        self.all_reduce_sum(torch.zeros(1))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Add up what every process gives, Σ_r values_r.

        Args:
            values: of one shape in every process, on any device.

        Returns:
            The same sum in every process, where `values` are.

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
        """Take the main process's word for something that may look different here, such as what is on disk.

        Args:
            values: of one shape in every process.

        Raises:
            ProcessError: if another process has stopped.
        """
        return self.all_reduce_sum(values if self.is_main else torch.zeros_like(values))

    def check_sees(self, path: Path) -> None:
        """Refuse a disk that this process does not share with the main one, which has written a file there.

        Raises:
            ProcessError: if the file is not there.
        """
        if not path.exists():
            raise ProcessError(
                f"process {self.rank} does not see {str(path)!r}, which process 0 has written.",
                "put the output folder on a disk that all machines share.",
            )

    def check_agreement(self, what: str, content: Any) -> None:
        """Refuse to go on unless every process is about to do the same.

        Args:
            what: it is about, for the error.
            content: plain data.

        Raises:
            ProcessError: if another process's content differs, in every process; or if one has stopped.
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
                f"process {others[0]} has another {what} than process 0.",
                "start all processes with the same arguments, on machines that see the same files.",
            )

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Say in one line that another process has stopped, should the talk between them in this block break off.

        Raises:
            ProcessError: if it does.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise ProcessError(
                    f"process {self.rank} of {self.world_size} has lost another one, which stopped or hangs.",
                    "that one's own message says why; what is finished is kept, so repeat the command to go on.",
                ) from error
            raise


SINGLE_PROCESS = ProcessGroup()
"""A process that was started alone."""
