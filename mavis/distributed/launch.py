"""Joining the processes that a launcher (`accelerate launch`, `torchrun`, MPI) started together."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from datetime import timedelta
from typing import Any

import torch

from mavis.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from mavis.errors import ConfigError

# How long a process waits for the others. One that has died is noticed at once; this is for one that hangs, and must be
# longer than the slowest process may be behind with its share of the rollouts, of which all are cut in advance.
_PATIENCE = timedelta(days=1)

_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def join_processes(device: torch.device | str | None = None) -> ProcessGroup:
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
    started = launcher_world_size()
    if started == 1:
        _refuse_lone_start()
    if not torch.distributed.is_available() or (started == 1 and not torch.distributed.is_initialized()):
        return SINGLE_PROCESS
    if device is None and not torch.distributed.is_initialized():
        return SINGLE_PROCESS
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
        atexit.register(leave_process_group)  # not so NCCL, where one that has failed would wait here for the others
    if state.num_processes > 1:
        _check_place(where, state)
    return ProcessGroup(state.process_index, state.num_processes, state.device)


def launcher_world_size() -> int:
    """Count the processes that the launcher of this one says it has started; 1 without one."""
    launched = "LOCAL_RANK" in os.environ
    return max(1, *(int(os.environ.get(name) or 1) for name in (*_MPI_SIZES, *(["WORLD_SIZE"] if launched else []))))


def launcher_rank() -> int:
    """Tell this process's number among them, as its launcher says."""
    if launcher_world_size() == 1:
        return 0
    return next((int(os.environ[name]) for name in ("RANK", *_MPI_RANKS) if os.environ.get(name)), 0)


def leave_process_group() -> None:
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
