"""The policies on which speed is measured."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mavis.policies import embedded, load_policy


def llama(vocabulary: int, layers: int, width: int) -> LlamaConfig:
    """Configure a Llama with heads of size 64."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4_096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def load(name: str) -> Any:
    """Load a policy: `random`, `embedded`, `smollm2`, a folder or a hub id."""
    if name == "random":
        torch.manual_seed(0)
        config = llama(32_000, layers=8, width=512)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    if name == "embedded":
        return embedded.load()[0]
    if name == "smollm2":
        return load_policy(name)[0]
    return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).eval().requires_grad_(False)
