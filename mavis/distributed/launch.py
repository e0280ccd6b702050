"""Joins the processes that a launcher (`accelerate launch`, `torchrun`, MPI) started."""

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

# How long a process waits for the others. A process that dies is noticed at once; this limit is for one that hangs. It
# must exceed the time by which the slowest process can lag behind with its shards of rollouts.
_TIMEOUT = timedelta(days=1)

_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def join_processes(device: torch.device | str | None = None) -> ProcessGroup:
    """Join the processes that `accelerate launch`, `torchrun` or MPI started with this one.

    The group is created once and lasts as long as the process. In a process that was started alone, nothing global is
    touched.

    Args:
        device: where this process's policy is, which selects the backend: NCCL between accelerators, gloo between
            CPUs; None returns a group that has been joined already and joins none.

    Returns:
        The group, of one process if this one is alone.

    Raises:
        ConfigError: if the policies of two processes are on one accelerator, or not where the processes were joined; or
            if several processes were requested and one was started.
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
    starts_group, fresh = not torch.distributed.is_initialized(), PartialState._shared_state == {}
    state = PartialState(cpu=where.type == "cpu", timeout=_TIMEOUT) if fresh else PartialState()
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else started
    if world_size != state.num_processes:
        raise ConfigError(
            f"there are {world_size} processes, but Accelerate runs this one alone.",
            "build the Accelerator with cpu=True where there are only CPUs, or leave it to mavis.",
        )
    # gloo aborts about half of the processes that exit without leaving their group. With NCCL a process that has failed
    # would wait there for the others.
    if starts_group and state.backend == "gloo":
        atexit.register(leave_process_group)
    if state.num_processes > 1:
        _check_device(where, state)
    return ProcessGroup(state.process_index, state.num_processes, state.device)


def launcher_world_size() -> int:
    """Read the number of processes from the launcher's environment variables; 1 without a launcher."""
    launched = "LOCAL_RANK" in os.environ
    return max(1, *(int(os.environ.get(name) or 1) for name in (*_MPI_SIZES, *(["WORLD_SIZE"] if launched else []))))


def launcher_rank() -> int:
    """Read the rank of this process from the launcher's environment variables; 0 without a launcher."""
    if launcher_world_size() == 1:
        return 0
    return next((int(os.environ[name]) for name in ("RANK", *_MPI_RANKS) if os.environ.get(name)), 0)


def leave_process_group() -> None:
    """Leave the process group; call it at the end of a job that has ended in all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # garbage can hold groups, and gloo aborts if one is left
        deepspeed_comm: Any = sys.modules.get("deepspeed.comm")
        uses_deepspeed = deepspeed_comm is not None and deepspeed_comm.is_initialized()
        (deepspeed_comm if uses_deepspeed else torch.distributed).destroy_process_group()


def _refuse_lone_start() -> None:
    """Refuse a start by `accelerate launch --cpu --num_processes 2`, which silently starts one process."""
    variables = ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu and all(name in os.environ for name in variables) and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "several processes were requested, but `accelerate launch --cpu` starts only one.",
            "start them by `accelerate launch --multi_gpu --num_processes 2 ...`, on CPUs too, or torchrun.",
        )


def _check_device(where: torch.device, state: Any) -> None:
    if where.type != state.device.type:
        raise ConfigError(
            f"the policy is on {str(where)!r}, but the {state.num_processes} processes were joined on "
            f"{state.device.type!r}.",
            "use one kind of device in one job.",
        )
    if where.index not in (None, state.device.index):
        raise ConfigError(
            f"process {state.process_index} has its policy on {str(where)!r}, but works on {str(state.device)!r}.",
            "put each process's policy on its own device (policy.device=cuda does); a policy that is spread over "
            "several accelerators needs a single process.",
        )
