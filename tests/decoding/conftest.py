"""Policies of several families, small and random, and critics with something to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from mavis import HiddenStateCritic

VOCABULARY = 40


def build(family: str) -> Any:
    torch.manual_seed(len(family))
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    configs = {
        "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **ends),
        "qwen2": lambda: Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **ends),
        "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_layer=2, n_embd=32, n_head=4, n_positions=128, **ends),
    }
    policy = AutoModelForCausalLM.from_config(configs[family]()).eval().requires_grad_(False)
    with torch.no_grad():  # freshly drawn models are nearly uniform; sharper ones tell right from wrong
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return policy


_policies = {family: build(family) for family in ("llama", "gpt2", "qwen2")}


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def policy(request: pytest.FixtureRequest) -> Any:
    """Each family in turn."""
    return _policies[request.param]


@pytest.fixture
def llama() -> Any:
    """One family, where the family does not matter."""
    return _policies["llama"]


@pytest.fixture
def make_critic() -> Callable[..., HiddenStateCritic]:
    """Build a critic whose heads differ from objective to objective and from state to state."""

    def make(policy: Any, objectives: tuple[str, ...] = ("a", "b"), seed: int = 0, **options: Any) -> HiddenStateCritic:
        critic = HiddenStateCritic.for_policy(policy, objectives, hidden=16, rank=8, seed=seed, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            critic.heads.outer.copy_(torch.randn(critic.heads.outer.shape, generator=generator))
            critic.heads.bias.copy_(torch.randn(critic.heads.bias.shape, generator=generator) * 0.3)
            if critic.heads.condition is not None:
                critic.heads.condition.copy_(torch.randn(critic.heads.condition.shape, generator=generator) * 0.5)
        return critic.eval()

    return make


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different length, padded on the left."""
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 3, 3, 20], [0, 1, 30, 12, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask}
