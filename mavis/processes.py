"""The processes that a launcher started together, and the place of this one among them."""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mavis.errors import ConfigError, ProcessError

# How long a process waits for the others. One that has died is noticed at once; this is for one that hangs, and must be
# longer than the slowest process may be behind with its share of the rollouts, of which all are cut in advance.
_PATIENCE = timedelta(days=1)

_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The processes of one job, which share a folder and nothing else.

    Args:
        index: of this process, 0 ≤ index < count; process 0 is the main one, which alone writes and speaks.
        count: of all.
        device: where tensors are sent from and arrive.
    """

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.index == 0

    def mine(self, items: Sequence[Item], before: int = 0) -> Sequence[Item]:
        """Take this process's share: every `count`-th item; the shares of all processes are the whole, each item once.

        Args:
            items: the same in every process; item i of them is number before + i of all, and goes to the process whose
                index that is modulo `count`.
            before: how many items earlier calls have shared out.
        """
        return items[(self.index - before) % self.count :: self.count]

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            ProcessError: if one has stopped instead.
        """
        self.total(torch.zeros(1))

    def total(self, values: Tensor) -> Tensor:
        """Add up what every process gives, Σ_r values_r.

        Args:
            values: of one shape in every process, on any device.

        Returns:
            The same sum in every process, where `values` are.

        Raises:
            ProcessError: if another process has stopped.
        """
        if self.count == 1:
            return values
        from accelerate.utils import reduce

        with self.talking():
            summed: Tensor = reduce(values.to(self.device), "sum").to(values.device)
        return summed

    def of_main(self, values: Tensor) -> Tensor:
        """Take the main process's word for something that may look different here, such as what is on disk.

        Args:
            values: of one shape in every process.

        Raises:
            ProcessError: if another process has stopped.
        """
        return self.total(values if self.main else torch.zeros_like(values))

    def check_sees(self, path: Path) -> None:
        """Refuse a disk that this process does not share with the main one, which has written a file there.

        Raises:
            ProcessError: if the file is not there.
        """
        if not path.exists():
            raise ProcessError(
                f"process {self.index} does not see {str(path)!r}, which process 0 has written.",
                "put the output folder on a disk that all machines share.",
            )

    def agree(self, what: str, content: Any) -> None:
        """Refuse to go on unless every process is about to do the same.

        Args:
            what: it is about, for the error.
            content: plain data.

        Raises:
            ProcessError: if another process's content differs, in every process; or if one has stopped.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.int64)
        differs = torch.zeros(self.count, dtype=torch.int64)
        differs[self.index] = int(not torch.equal(self.of_main(mine), mine))
        others = self.total(differs).nonzero()[:, 0].tolist()
        if others:
            raise ProcessError(
                f"process {others[0]} has another {what} than process 0.",
                "start all processes with the same arguments, on machines that see the same files.",
            )

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Say in one line that another process has stopped, should the talk between them in this block break off.

        Raises:
            ProcessError: if it does.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise ProcessError(
                    f"process {self.index} of {self.count} has lost another one, which stopped or hangs.",
                    "that one's own message says why; what is finished is kept, so repeat the command to go on.",
                ) from error
            raise


ALONE = Processes()
"""A process that was started alone."""


def here(device: torch.device | str | None = None) -> Processes:
    """Join the processes that `accelerate launch`, `torchrun` or MPI has started with this one.

    The group is made once and stays for the life of the process. A process that was started alone stays alone, and
    nothing global is touched.

    Args:
        device: where this process's policy is, which decides what the processes talk over: NCCL between accelerators,
            gloo between CPUs; None only looks whether they have been joined already.

    Returns:
        The processes; one if this one is alone.

    Raises:
        ConfigError: if the policies of two processes are on one accelerator, or not where the processes were joined; or
            if several processes were asked for and one was started.
    """
    started = started_together()
    if started == 1:
        _refuse_lone_start()
    if not torch.distributed.is_available() or (started == 1 and not torch.distributed.is_initialized()):
        return ALONE
    if device is None and not torch.distributed.is_initialized():
        return ALONE
    from accelerate import PartialState

    if device is None:
        device = "cuda" if "nccl" in torch.distributed.get_backend() else "cpu"
    where = torch.device(device)
    ours, fresh = not torch.distributed.is_initialized(), PartialState._shared_state == {}
    state = PartialState(cpu=where.type == "cpu", timeout=_PATIENCE) if fresh else PartialState()
    together = torch.distributed.get_world_size() if torch.distributed.is_initialized() else started
    if together != state.num_processes:
        raise ConfigError(
            f"there are {together} processes, but Accelerate takes this one to be alone.",
            "build its Accelerator with cpu=True where there are only CPUs, or leave that to mavis.",
        )
    if ours and state.backend == "gloo":  # which aborts about every second process that ends without parting
        atexit.register(leave)  # not so NCCL, where one that has failed would wait here for the others
    if state.num_processes > 1:
        _check_place(where, state)
    return Processes(state.process_index, state.num_processes, state.device)


def started_together() -> int:
    """Count the processes that the launcher of this one says it has started; 1 without one."""
    launched = "LOCAL_RANK" in os.environ
    return max(1, *(int(os.environ.get(name) or 1) for name in (*_MPI_SIZES, *(["WORLD_SIZE"] if launched else []))))


def started_as() -> int:
    """Tell this process's number among them, as its launcher says."""
    if started_together() == 1:
        return 0
    return next((int(os.environ[name]) for name in ("RANK", *_MPI_RANKS) if os.environ.get(name)), 0)


def leave() -> None:
    """Part from the other processes at the end of a job that has come to its end in all of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what has been thrown away can hold groups, and gloo aborts where one is left
        keeps_groups: Any = sys.modules.get("deepspeed.comm")
        own = keeps_groups is not None and keeps_groups.is_initialized()
        (keeps_groups if own else torch.distributed).destroy_process_group()


def _refuse_lone_start() -> None:
    """Refuse what `accelerate launch --cpu --num_processes 2` does: it starts one and tells it of no other."""
    marks = ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT")
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and all(mark in os.environ for mark in marks)
    if asked and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "several processes were asked for, but `accelerate launch --cpu` starts only one.",
            "start them by `accelerate launch --multi_gpu --num_processes 2 ...`, on CPUs too, or by torchrun.",
        )


def _check_place(where: torch.device, state: Any) -> None:
    if where.type != state.device.type:
        raise ConfigError(
            f"the policy is on {str(where)!r}, but the {state.num_processes} processes were joined on "
            f"{state.device.type!r}.",
            "train on one kind of device in one job.",
        )
    if where.index not in (None, state.device.index):
        raise ConfigError(
            f"process {state.process_index} has its policy on {str(where)!r}, but works on {str(state.device)!r}.",
            "put each process's policy on its own (policy.device=cuda does); a policy that is spread over several "
            "accelerators is for one process.",
        )
