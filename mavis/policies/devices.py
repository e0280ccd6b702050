"""Where a policy's hidden states and weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mavis.errors import PolicyError, first_sentence
from mavis.policies.embeddings import output_embedding
from mavis.policies.protocol import CausalLM


def states_device(policy: CausalLM) -> torch.device:
    """Return the device on which hidden states reach the output embedding.

    Raises:
        PolicyError: if the policy has no output embedding, or no weights.
    """
    embedding = output_embedding(policy)
    # Offloaded weights are on the execution device only during a forward pass.
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        weight = getattr(embedding, "weight", None)  # a method in quantised layers
        device = weight.device if isinstance(weight, torch.Tensor) else policy.device
    device = torch.device(device)
    if device.type == "meta":
        raise PolicyError(
            f"policy {type(policy).__name__} is on device 'meta', where there are no weights.",
            "load its weights, e.g. by from_pretrained.",
        )
    return device


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device` that let transformers spread a policy over several accelerators."""


def check_placement(dtype: str | torch.dtype, device: str | torch.device) -> None:
    """Check the precision and the device that a policy is to be loaded in, before it is.

    Args:
        dtype: a floating dtype or its name, or `auto`.
        device: a device or one of `DEVICE_MAPS`.

    Raises:
        PolicyError: if there is no such dtype or device.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise PolicyError(
            f"policy.dtype is {dtype!r}, which is not a floating dtype of torch.",
            "use auto, float32, bfloat16 or float16.",
        )
    if str(device) in DEVICE_MAPS:
        return
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PolicyError(
            f"policy.device is {str(device)!r}, which torch cannot use: {first_sentence(error)}.",
            "use cpu, or install a build of torch for the accelerator.",
        ) from error
    if kind == "meta":
        raise PolicyError("policy.device is 'meta', where there are no weights.", "use cpu or an accelerator.")


@contextmanager
def weights_loaded(module: torch.nn.Module) -> Iterator[None]:
    """Load a module's own weights for the block, if accelerate keeps them offloaded between forward passes."""
    if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
    else:
        yield
