"""The processes of one job: joining them, and communication between them."""

from mavis.distributed.launch import join_processes, launcher_rank, launcher_world_size, leave_process_group
from mavis.distributed.process_group import SINGLE_PROCESS, ProcessGroup

__all__ = [
    "SINGLE_PROCESS",
    "ProcessGroup",
    "join_processes",
    "launcher_rank",
    "launcher_world_size",
    "leave_process_group",
]
