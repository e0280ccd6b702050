"""Low-rank adapters: a trunk that learns by a small share of its weights, through peft."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mavis.errors import import_optional


def add_lora(trunk: nn.Module, rank: int) -> None:
    """Give every linear layer of a trunk an adapter that starts at nothing, and freeze all that was there.

        W x  becomes  W x + 2 B A x,     A: (r, in),  B: (out, r) = 0

    Args:
        trunk: changed in place.
        rank: r ≥ 1.

    Raises:
        MissingPackageError: if peft is not installed.

    Source: LoRA (Hu et al., ICLR 2022); the factor, α / r, is that of the paper's value models (arXiv 2508.13415).
    """
    peft = import_optional(
        "peft", f"lora_rank={rank}", "lora", ", or merge the adapters by critic.merge_lora() where it is installed"
    )
    # Layers of GPT-2's kind hold their weight the other way round, and peft warns unless it is told so.
    transposed = any(isinstance(module, Conv1D) for module in trunk.modules())
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    peft.inject_adapter_in_model(config, trunk)


def merge_lora(trunk: Any) -> None:
    """Fold the adapters of a trunk into its weights, all of which are trained again from now on.

        W  becomes  W + 2 B A

    Args:
        trunk: what `add_lora` has changed; afterwards it is built as it was before.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: layer for name, layer in trunk.named_modules() if isinstance(layer, BaseTunerLayer)}
    for layer in reversed(adapted.values()):  # those of experts stand inside one another
        layer.merge()
    for name, layer in adapted.items():
        if name.rpartition(".")[0] not in adapted:
            trunk.set_submodule(name, layer.get_base_layer())
    del trunk.peft_config
    trunk.requires_grad_(True)
