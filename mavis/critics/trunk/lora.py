"""Low-rank adapters on a trunk, by peft."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mavis.errors import import_optional


def add_lora(trunk: nn.Module, rank: int) -> None:
    """Add a zero-initialised adapter to every linear layer of a trunk, and freeze its own weights.

        W x  becomes  W x + 2 B A x,     A: (r, in),  B: (out, r) = 0

    Args:
        trunk: changed in place.
        rank: r ≥ 1.

    Raises:
        MissingPackageError: if peft is not installed.

    Source: LoRA (Hu et al., ICLR 2022); the factor α / r = 2 is that of the paper's value models (arXiv 2508.13415).
    """
    peft = import_optional(
        "peft", f"lora_rank={rank}", "lora", ", or merge the adapters by critic.merge_lora() where it is installed"
    )
    # GPT-2's layers store their weights transposed, and peft warns unless this is set.
    transposed = any(isinstance(module, Conv1D) for module in trunk.modules())
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    peft.inject_adapter_in_model(config, trunk)


def merge_lora(trunk: Any) -> None:
    """Merge the adapters of a trunk into its weights, and unfreeze all of them.

        W  becomes  W + 2 B A

    Args:
        trunk: one that `add_lora` has changed; its adapter layers are replaced by the original ones.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: layer for name, layer in trunk.named_modules() if isinstance(layer, BaseTunerLayer)}
    for layer in reversed(adapted.values()):  # adapters of experts are nested
        layer.merge()
    for name, layer in adapted.items():
        if name.rpartition(".")[0] not in adapted:
            trunk.set_submodule(name, layer.get_base_layer())
    del trunk.peft_config
    trunk.requires_grad_(True)
