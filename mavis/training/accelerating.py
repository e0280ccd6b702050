"""Accelerate, borrowed for one fit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mavis.errors import ConfigError

_borrowing = threading.Lock()
_borrowers = 0  # how many fits, in as many threads, use it now
_ours = False  # whether there was no state before the first of them


@contextmanager
def accelerator(device: torch.device) -> Iterator[Any]:
    """Borrow Accelerate: its configuration decides on precision, sharding and what the processes talk over.

    Accelerate keeps one state per process, with one device. So it places nothing, and a lone process that had no such
    state before has none afterwards: it can train on a CPU and then on an accelerator.

    Args:
        device: where the fit is.

    Yields:
        An `Accelerator`.

    Raises:
        ConfigError: if it is configured for a way of sharding that is not supported.
    """
    check_sharding()
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    # Buffers are the same everywhere, and some as large as a vocabulary: they are not sent round at every step.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False)
    global _borrowers, _ours
    with _borrowing:
        fresh = PartialState._shared_state == {}
        _ours = fresh if _borrowers == 0 else _ours
        options = {"cpu": True} if fresh and device.type == "cpu" else {}
        borrowed = Accelerator(device_placement=False, kwargs_handlers=[parallel], **options)
        _borrowers += 1
    try:
        yield borrowed
    finally:
        with _borrowing:
            _borrowers -= 1
            if _ours and _borrowers == 0:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()


def sharded(accelerate: Any) -> bool:
    """Whether an `Accelerator` cuts what it prepares into shards, so that nobody holds it whole."""
    return bool(accelerate.is_fsdp2)


def check_sharding() -> None:
    """Refuse the ways of sharding that a fit does not undo: each has its own form for a network cut in pieces.

    Only FSDP 2 leaves every weight a tensor of its own, under its own name and at its own rate.

    Raises:
        ConfigError: naming it.
    """
    names = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "FSDP": "FSDP 1"}
    if os.environ.get("FSDP_VERSION") == "2":
        del names["FSDP"]
    for name, shown in names.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"Accelerate is configured for {shown}, which mavis does not train with.",
                "shard by FSDP 2 (--use_fsdp --fsdp_version 2), or do not shard (--multi_gpu): most critics are small.",
            )
