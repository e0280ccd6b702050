"""Small random policies, untied and tied, in several precisions, and fine-tuned versions of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.factories import NEVER_ENDING, tiny_llama

Build = Callable[..., Any]


def _build(tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int) -> Any:
    options: dict[str, Any] = {"num_key_value_heads": 1, "initializer_range": 0.2} | NEVER_ENDING | sizes
    with torch.random.fork_rng(devices=[]):
        return tiny_llama(seed, tie_word_embeddings=tied, **options).to(dtype)


def _tuned(policy: Any, seed: int = 1, scale: float = 0.05, only: str = "") -> Any:
    """A copy in which every tensor whose name contains `only` is perturbed."""
    aligned = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in aligned.named_parameters():
            if only in name:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
    return aligned


@pytest.fixture
def build() -> Build:
    """A function that builds a small Llama."""
    return _build


@pytest.fixture
def tuned() -> Build:
    """A function that copies a model and perturbs its weights."""
    return _tuned


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A function that saves a model and returns its folder."""

    def save(model: Any, name: str, **options: Any) -> Path:
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def logits() -> Callable[[Any], Tensor]:
    """A function that computes the logits of one sequence."""

    def read(policy: Any) -> Tensor:
        with torch.no_grad():
            return policy(torch.arange(1, 13)[None]).logits

    return read


class Before:
    """A snapshot of a policy, to compare it with later."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.tensors = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        self.pointers = {name: tensor.data_ptr() for name, tensor in policy.state_dict().items()}

    def assert_unchanged(self) -> None:
        """Bit-identical, at the same addresses, tied as before."""
        now = self.policy.state_dict()
        assert list(now) == list(self.tensors)
        for name, tensor in self.tensors.items():
            assert now[name].dtype == tensor.dtype
            assert torch.equal(now[name], tensor), name
            assert now[name].data_ptr() == self.pointers[name], name


@pytest.fixture
def before() -> type[Before]:
    """The class that takes a snapshot of a policy."""
    return Before
