"""The protocol of a causal LM: the attributes and methods that mavis uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn


class CausalLM(Protocol):
    """A causal language model of transformers, or a wrapper that passes these attributes on.

    Hidden states are read by hooks on the model and on its output embedding, so weights and forward pass stay as they
    are.

    Attributes:
        config: with `model_type`.
        generation_config: the defaults of `generate`; a critic is trained without its penalties and filters.
        device: where inputs go.
        base_model: the model without its output embedding.

    Examples:
        >>> from mavis.policies import CausalLM, embedded
        >>> def vocabulary_size(policy: CausalLM) -> int:
        ...     return policy.get_output_embeddings().out_features
        >>> vocabulary_size(embedded.load()[0])
        2048
    """

    config: Any
    generation_config: Any
    device: Any
    base_model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass; the result has `logits`."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts."""

    def get_input_embeddings(self) -> Any:
        """Return the layer that maps token ids to vectors; its `weight` is (V', E)."""

    def get_output_embeddings(self) -> Any:
        """Return the layer that maps hidden states to logits, or None if the model has none."""

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over the model and its submodules."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the model and its submodules with their names."""

    def register_forward_pre_hook(self, hook: Any, *, with_kwargs: bool = False) -> Any:
        """Call a function before every forward pass; the returned handle has `remove()`."""
