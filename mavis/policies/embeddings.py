"""The output embedding of a policy, and its shape."""

from __future__ import annotations

from typing import Any

import torch

from mavis.errors import PolicyError


def output_embedding(policy: Any) -> torch.nn.Module:
    """Return the layer that maps hidden states to logits.

    Raises:
        PolicyError: if there is none.
    """
    find = getattr(policy, "get_output_embeddings", None)
    embedding = find() if callable(find) else None
    if embedding is None:
        raise PolicyError(
            f"policy {type(policy).__name__} has no output embedding (get_output_embeddings() gave nothing).",
            "load the model with its language-model head, e.g. by AutoModelForCausalLM.",
        )
    return embedding


def embedding_shape(embedding: torch.nn.Module) -> tuple[int, int]:
    """Return (hidden size, vocabulary size) of an output embedding; some families' configs disagree with it."""
    sizes = getattr(embedding, "in_features", None), getattr(embedding, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[1]), int(weight.shape[0])


def embedding_width(policy: Any) -> int:
    """Return E, the width of a policy's input embedding."""
    embedding = policy.get_input_embeddings()
    width = getattr(embedding, "embedding_dim", None)  # quantised weights have other shapes
    return width if isinstance(width, int) else int(embedding.weight.shape[1])


def is_quantised(weight: torch.Tensor) -> bool:
    """Return whether a weight is stored as something other than floating-point numbers, such as torchao's classes."""
    if not weight.is_floating_point():
        return True
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return False
    return type(weight).dequantize is not torch.Tensor.dequantize or plain_weight(weight) is None


def plain_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """Return a weight as a plain tensor: quantised ones of classes of their own are dequantised.

    Returns:
        The tensor, without gradients, or None if its class supports neither reading nor dequantising.
    """
    weight = weight.detach()
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return weight
    try:
        plain = weight.dequantize() if type(weight).dequantize is not torch.Tensor.dequantize else weight
        plain.reshape(-1)
    except (NotImplementedError, RuntimeError):
        return None
    return plain
