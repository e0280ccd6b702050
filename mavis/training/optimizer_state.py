"""Optimiser states as named tensors for safetensors, since loading a pickle can run code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Name every tensor of the optimisers' states.

    Args:
        optimizers: with states of tensors only, such as those of Adam and Muon.

    Returns:
        Tensors by `<optimiser>.<parameter>.<name>`, the first two counted from 0.
    """
    return {
        f"{k}.{index}.{name}": value.contiguous()
        for k, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizers(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Load the states that `optimizer_tensors` returned.

    Args:
        optimizers: over the same parameters in the same order.
        tensors: by name.
    """
    for k, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for name, value in tensors.items():
            which, index, key = name.split(".")
            if int(which) == k:
                content["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(content)
