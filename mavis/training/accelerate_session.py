"""Accelerate for the duration of one fit."""

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
"""Gradients are clipped to this norm."""

_lock = threading.Lock()
_sessions = 0  # number of fits, in as many threads, that use Accelerate now
_owns_state = False  # whether Accelerate had no state before the first of them


@contextmanager
def accelerator(device: torch.device) -> Iterator[Any]:
    """Open an Accelerate session, whose configuration sets precision, sharding and the communication backend.

    Accelerate keeps one global state per process, with one device. The session therefore places nothing on devices, and
    resets the state at its end if there was none before: a process can train on a CPU and then on an accelerator.

    Args:
        device: of the fit.

    Yields:
        An `Accelerator`.

    Raises:
        ConfigError: if it is configured for something that a fit does not support.
    """
    check_sharding()
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    # Buffers are equal in all processes, and some are as large as a vocabulary: do not broadcast them at every step.
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False)
    global _sessions, _owns_state
    with _lock:
        fresh = PartialState._shared_state == {}
        _owns_state = fresh if _sessions == 0 else _owns_state
        options = {"cpu": True} if fresh and device.type == "cpu" else {}
        accelerate = Accelerator(device_placement=False, kwargs_handlers=[parallel], **options)
        _sessions += 1
    try:
        configure_deepspeed(accelerate)
        yield accelerate
    finally:
        with _lock:
            _release_deepspeed(accelerate)
            _sessions -= 1
            if _owns_state and _sessions == 0:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()


def modifies_modules(accelerate: Any) -> bool:
    """Return whether `prepare` changes modules irreversibly, by sharding their weights or adding hooks."""
    return bool(accelerate.is_fsdp2) or _deepspeed(accelerate) is not None


def trained_state(accelerate: Any, module: nn.Module) -> dict[str, Tensor]:
    """Copy the trained part of a module's state, gathered from all processes.

    Args:
        accelerate: the `Accelerator` that prepared the module.
        module: the prepared module, or a part of it.

    Returns:
        Its unsharded state without frozen parameters: a frozen trunk may be too large to keep twice.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    with _gathered(accelerate, module):
        return {name: _whole(tensor) for name, tensor in module.state_dict().items() if name not in frozen}


@contextmanager
def _gathered(accelerate: Any, module: nn.Module) -> Iterator[None]:
    """Gather weights that DeepSpeed's third stage has sharded while the block runs."""
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
    """Fill in the settings that DeepSpeed requires and that the fit decides: batch sizes and gradient clipping.

    Raises:
        ConfigError: if DeepSpeed would keep the weights in half precision, which is too coarse for a critic, or brings
            an optimiser or a schedule of its own.
    """
    plugin = _deepspeed(accelerate)
    if plugin is None:
        return
    if accelerate.mixed_precision != "no":
        raise ConfigError(
            f"mixed_precision is {accelerate.mixed_precision!r}, under which DeepSpeed would keep a critic's weights "
            "in half precision.",
            "set mixed_precision to no.",
        )
    config = plugin.deepspeed_config
    if own := sorted({"optimizer", "scheduler"} & set(config)):
        raise ConfigError(f"DeepSpeed's configuration has an entry {own[0]!r}, but a fit brings its own.", "remove it.")
    # DeepSpeed only logs these: every process gets its share of a batch from `ShardedRollouts`.
    config["train_micro_batch_size_per_gpu"] = 1
    config["train_batch_size"] = accelerate.num_processes
    config["gradient_accumulation_steps"] = accelerate.gradient_accumulation_steps = 1
    config["gradient_clipping"] = GRADIENT_NORM


def _release_deepspeed(accelerate: Any) -> None:
    """Destroy an engine and make transformers forget it: later models would be sharded and wait for other processes."""
    plugin = _deepspeed(accelerate)
    if plugin is not None:
        from transformers.integrations import unset_hf_deepspeed_config

        if accelerate.deepspeed_engine_wrapped is not None:
            accelerate.deepspeed_engine_wrapped.engine.destroy()
        plugin.dschf = None
        unset_hf_deepspeed_config()


def check_accelerate(device: torch.device) -> None:
    """Check Accelerate's configuration before any work is done for a fit.

    Args:
        device: of the fit.

    Raises:
        ConfigError: see `accelerator`.
    """
    check_sharding()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        with accelerator(device):
            pass


def check_sharding() -> None:
    """Refuse ways of sharding that merge or rename parameters.

    FSDP 2 and DeepSpeed keep every parameter as a tensor under its own name, so that it keeps its own learning rate and
    can be gathered.

    Raises:
        ConfigError: for FSDP 1 and Megatron-LM.
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
