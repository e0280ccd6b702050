"""The states of optimisers as named tensors, which safetensors can hold: a pickle could run code when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Name every tensor of the optimisers' states.

    Args:
        optimizers: whose states hold tensors only, as those of Adam and Muon do.

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
    """Put states back in place.

    Args:
        optimizers: as they were when `optimizer_tensors` was called, but for their states.
        tensors: what it returned.
    """
    for k, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for name, value in tensors.items():
            which, index, key = name.split(".")
            if int(which) == k:
                content["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(content)
