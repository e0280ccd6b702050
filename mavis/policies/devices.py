"""Where a policy's hidden states and weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mavis.errors import PolicyError
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


@contextmanager
def weights_loaded(module: torch.nn.Module) -> Iterator[None]:
    """Load a module's own weights for the block, if accelerate keeps them offloaded between forward passes."""
    if any(parameter.device.type == "meta" for parameter in module.parameters(recurse=False)):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
    else:
        yield
