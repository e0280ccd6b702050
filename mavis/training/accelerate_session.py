"""Accelerate, borrowed for one fit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mavis.errors import ConfigError

GRADIENT_NORM = 1.0
"""What gradients are clipped to."""

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
        ConfigError: if it is configured for something that a fit does not support.
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
        configure_deepspeed(borrowed)
        yield borrowed
    finally:
        with _borrowing:
            _forget_deepspeed(borrowed)
            _borrowers -= 1
            if _ours and _borrowers == 0:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()


def modifies_modules(accelerate: Any) -> bool:
    """Whether what an `Accelerator` has prepared cannot be used as before: it is cut into shards, or has hooks."""
    return bool(accelerate.is_fsdp2) or _deepspeed(accelerate) is not None


def trained_state(accelerate: Any, module: nn.Module) -> dict[str, Tensor]:
    """Copy all that training may change, gathered from all processes.

    Args:
        accelerate: the `Accelerator` that prepared it.
        module: the one that was prepared, or a part of it.

    Returns:
        Its state, whole, without frozen parameters: a frozen trunk can be too large to be held twice.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    with _gathered(accelerate, module):
        return {name: _whole(tensor) for name, tensor in module.state_dict().items() if name not in frozen}


@contextmanager
def _gathered(accelerate: Any, module: nn.Module) -> Iterator[None]:
    """Undo DeepSpeed's third stage while the block runs: its tensors cannot gather themselves."""
    plugin = _deepspeed(accelerate)
    if plugin is None or plugin.zero_stage < 3:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([weight for weight in module.parameters() if weight.requires_grad]):
        yield


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)  # of FSDP 2
    return tensor.detach().clone() if gather is None else gather().detach()


def _deepspeed(accelerate: Any) -> Any:
    return getattr(accelerate.state, "deepspeed_plugin", None)


def configure_deepspeed(accelerate: Any) -> None:
    """Fill in what DeepSpeed asks of a fit that brings no loader of its own and says for itself how it clips.

    Raises:
        ConfigError: if it is to keep the weights in half precision, in which the last ones of a critic are lost.
    """
    plugin = _deepspeed(accelerate)
    if plugin is None:
        return
    if accelerate.mixed_precision != "no":
        raise ConfigError(
            f"mixed_precision is {accelerate.mixed_precision!r}, under which DeepSpeed turns the weights of a critic "
            "themselves into half precision.",
            "set mixed_precision to no.",
        )
    config = plugin.deepspeed_config
    if own := sorted({"optimizer", "scheduler"} & set(config)):
        raise ConfigError(
            f"DeepSpeed's configuration has an entry {own[0]!r}, but a fit brings its own.", "leave it out."
        )
    # Only its own records read these: each process is given its share of every batch, and says how much that is.
    config["train_micro_batch_size_per_gpu"] = 1
    config["train_batch_size"] = accelerate.num_processes
    config["gradient_accumulation_steps"] = accelerate.gradient_accumulation_steps = 1
    config["gradient_clipping"] = GRADIENT_NORM


def _forget_deepspeed(accelerate: Any) -> None:
    """Let go of an engine, and let transformers forget it: what is built or sampled later would wait for the others."""
    plugin = _deepspeed(accelerate)
    if plugin is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        if accelerate.deepspeed_engine_wrapped is not None:
            accelerate.deepspeed_engine_wrapped.engine.destroy()
        plugin.dschf = None
        unset_hf_deepspeed_config()


def check_accelerate(device: torch.device) -> None:
    """Refuse what a fit would refuse, before anything is done for it.

    Args:
        device: where the fit will be.

    Raises:
        ConfigError: see `accelerator`.
    """
    check_sharding()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        with accelerator(device):
            pass


def check_sharding() -> None:
    """Refuse the ways of sharding that a fit does not undo: each has its own form for a network cut in pieces.

    FSDP 2 and DeepSpeed leave every weight a tensor of its own, under its own name and at its own rate.

    Raises:
        ConfigError: naming it.
    """
    names = {"MEGATRON_LM": "Megatron-LM", "FSDP": "FSDP 1"}
    if os.environ.get("FSDP_VERSION") == "2":
        del names["FSDP"]
    for name, shown in names.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"Accelerate is configured for {shown}, which mavis does not train with.",
                "shard by FSDP 2 (--use_fsdp --fsdp_version 2) or DeepSpeed (--use_deepspeed), or do not shard "
                "(--multi_gpu): most critics are small.",
            )
