"""Policies of every family are read where their scores are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mavis.errors import DecodingError
from tests.decoding.steps import REPETITIVE, ByHand, Inputs, MakeCritic, expect_tilted, processed, tilt_for

ENDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "hidden_size": 32}
SIZES = ENDS | {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 48}
SHARED = WIDE | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma": SHARED | {"head_dim": 8},
    "Gemma2": SHARED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "Gemma3Text": SHARED | {"head_dim": 8, "sliding_window": 4},
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "GPTNeoX": WIDE,
    "Mistral": SHARED | {"sliding_window": 4},
    "Falcon": SIZES,
    "Bloom": SIZES,
    "Phi": WIDE,
    "Cohere": SHARED | {"logit_scale": 0.3},
    "Granite": SHARED | {"logits_scaling": 3.0},
    "Mamba": ENDS | {"num_hidden_layers": 2, "state_size": 4},
    "Jamba": SHARED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_read_where_its_scores_are_made(
    make_critic: MakeCritic, tilted_by_hand: ByHand, prompts: Inputs, either: dict[str, Any], family: str
) -> None:
    """Also where logits are scaled or capped, states are projected, or the window is shorter than the sequence."""
    torch.manual_seed(1)
    policy = (
        AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**FAMILIES[family]))
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    critic = make_critic(policy, **either)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
    with critic.attach(policy):
        for arguments in [*ways, {"cache_implementation": "static"}]:
            seen = processed(policy, prompts, tilt_for(critic), **arguments)
            expect_tilted(tilted_by_hand, policy, critic, seen, prompts)
        if family not in ("Mamba", "Jamba"):  # generate refuses them
            arguments = {"do_sample": False, "max_new_tokens": 12, "logits_processor": tilt_for(critic)}
            plain = policy.generate(**REPETITIVE, **arguments)
            assert torch.equal(policy.generate(**REPETITIVE, **arguments, prompt_lookup_num_tokens=3), plain)


def test_states_that_nobody_counts_are_refused(make_critic: MakeCritic, prompts: Inputs) -> None:
    config = transformers.RwkvConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        context_length=64,
        eos_token_id=None,
    )
    policy = AutoModelForCausalLM.from_config(config).eval()
    critic = make_critic(policy)
    with critic.attach(policy), pytest.raises(DecodingError, match="states kept outside past_key_values"):
        processed(policy, prompts, tilt_for(critic))
