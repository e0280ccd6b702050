"""Value models with adapters: training, reading, saving and merging."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LogitsProcessor, MixtralConfig

import mavis
from mavis.critics import ValueModelCritic
from mavis.errors import CriticError, MissingPackageError
from tests.factories import NEVER_ENDING, tiny_llama

peft = pytest.importorskip("peft")

PROMPTS = torch.tensor([[0, 0, 5, 9], [3, 7, 1, 4]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
BOTH = pytest.mark.parametrize("readout", ["token", "candidates"])


@pytest.fixture
def policy() -> Any:
    return tiny_llama(vocab_size=20, num_key_value_heads=1, initializer_range=0.3, **NEVER_ENDING)


def adapted(policy: Any, **options: Any) -> ValueModelCritic:
    """A critic with random heads and adapters."""
    critic = ValueModelCritic.for_policy(
        policy, ["a", "b"], **({"hidden": 8, "rank": 4, "lora_rank": 3, "composition": "independent"} | options)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        critic.heads.outer.normal_()
        for name, parameter in critic.trunk.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return critic


class RecordValues(LogitsProcessor):
    """Record all values of a critic at every step."""

    def __init__(self, critic: ValueModelCritic) -> None:
        self.critic = critic
        self.recorded: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.recorded.append(self.critic.values(input_ids, None))
        return scores


def generated(policy: Any, critic: ValueModelCritic, steps: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of a greedy generation, and all values at every step: (B, T, V, M)."""
    record = RecordValues(critic)
    with critic.attach(policy):
        ids = policy.generate(
            input_ids=PROMPTS, attention_mask=MASK, do_sample=False, max_new_tokens=steps, logits_processor=[record]
        )
    return ids, torch.stack(record.recorded, dim=1)


# Training


@pytest.mark.parametrize("backbone", [None, GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)])
def test_only_adapters_on_every_linear_layer_are_trained(policy: Any, backbone: Any) -> None:
    whole = ValueModelCritic.for_policy(policy, ["a"], backbone=backbone)
    critic = ValueModelCritic.for_policy(policy, ["a"], backbone=backbone, lora_rank=3)
    layers = {name for name, weight in whole.trunk.named_parameters() if weight.dim() == 2 and "proj" in name}
    layers |= {name for name, weight in whole.trunk.named_parameters() if "c_" in name and weight.dim() == 2}
    found = {name: weight for name, weight in critic.trunk.named_parameters() if weight.requires_grad}
    assert len(layers) == (14 if backbone is None else 4)
    assert {name.partition(".lora_")[0] + ".weight" for name in found} == layers
    assert all(3 in weight.shape for weight in found.values())
    assert all(weight.requires_grad for weight in critic.heads.parameters())


@BOTH
def test_new_adapters_have_no_effect(policy: Any, readout: Any) -> None:
    critics = [ValueModelCritic.for_policy(policy, ["a"], readout=readout, lora_rank=rank) for rank in (0, 3)]
    is_token, no_states = MASK.bool(), torch.zeros(2, 2, 0)
    whole, new = (critic.rollout_inputs(PROMPTS, is_token, no_states) for critic in critics)
    assert torch.equal(whole, new)


def test_adapters_depend_on_the_seed_alone(policy: Any) -> None:
    state = torch.get_rng_state()
    one, same, other = (
        ValueModelCritic.for_policy(policy, ["a"], lora_rank=3, seed=seed).trunk.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    drawn = [name for name in one if "lora_A" in name]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert torch.equal(torch.get_rng_state(), state)


# Reading


@BOTH
def test_values_step_by_step_equal_those_of_whole_prefixes(policy: Any, readout: Any) -> None:
    critic = adapted(policy, readout=readout)
    ids, values = generated(policy, critic)
    every = torch.arange(20)
    for row in range(2):
        for step in range(4):
            prefix = ids[row, : 4 + step][MASK[row].argmax() :]
            whole = torch.cat([prefix.expand(20, -1), every[:, None]], dim=1)
            with torch.no_grad():
                inputs = critic.rollout_inputs(whole, torch.ones_like(whole) > 0, torch.zeros(20, 1, 0))[:, 0]
                expected = critic.values_from_inputs(inputs, every[:, None])[:, 0]
            torch.testing.assert_close(values[row, step], expected, rtol=1e-4, atol=1e-5)
    plain = adapted(policy, readout=readout, lora_rank=0)
    assert not torch.allclose(generated(policy, plain)[1], values, atol=1e-2)


def test_changed_adapters_invalidate_the_cache(policy: Any) -> None:
    """States of the old weights are not reused with the new ones."""
    critic = adapted(policy)
    with critic.attach(policy):
        policy(input_ids=PROMPTS, attention_mask=MASK)
        before = critic.values(PROMPTS, None)
        with torch.no_grad():
            for name, parameter in critic.trunk.named_parameters():
                if "lora_B" in name:
                    parameter.neg_()
        after = critic.values(PROMPTS, None)
    assert not torch.allclose(before, after, atol=1e-2)


# Saving and merging


@BOTH
def test_saved_critic_keeps_its_adapters(policy: Any, tmp_path: Path, readout: Any) -> None:
    critic = adapted(policy, readout=readout)
    critic.save_pretrained(tmp_path / "critic")
    assert sorted(path.name for path in (tmp_path / "critic").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again = mavis.Critic.from_pretrained(tmp_path / "critic")
    assert isinstance(again, ValueModelCritic)
    assert again.settings() == critic.settings()
    assert again.settings()["lora_rank"] == 3
    assert [w.requires_grad for w in again.parameters()] == [w.requires_grad for w in critic.parameters()]
    assert torch.equal(generated(policy, again)[1], generated(policy, critic)[1])


@pytest.mark.parametrize("backbone", [None, GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)])
def test_merged_adapters_keep_the_values(
    policy: Any, tmp_path: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = adapted(policy, backbone=backbone)
    _, values = generated(policy, critic)
    critic.merge_lora()
    whole = ValueModelCritic.for_policy(
        policy, ["a", "b"], backbone=backbone, hidden=8, rank=4, composition="independent"
    )
    assert critic.settings() == whole.settings()
    assert list(critic.state_dict()) == list(whole.state_dict())
    assert all(parameter.requires_grad for parameter in critic.parameters())
    torch.testing.assert_close(generated(policy, critic)[1], values, rtol=1e-5, atol=1e-5)
    critic.save_pretrained(tmp_path / "critic")
    monkeypatch.setitem(sys.modules, "peft", None)
    again = mavis.Critic.from_pretrained(tmp_path / "critic")
    again.merge_lora()  # there is nothing left to merge
    assert torch.equal(generated(policy, again)[1], generated(policy, critic)[1])


def test_adapters_can_be_merged_while_attached(policy: Any) -> None:
    critic = adapted(policy)
    with critic.attach(policy):
        policy(input_ids=PROMPTS, attention_mask=MASK)
        before = critic.values(PROMPTS, None)
        critic.merge_lora()
        torch.testing.assert_close(critic.values(PROMPTS, None), before, rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize("rank", [-1, 1.5, True])
def test_invalid_ranks_are_refused(policy: Any, rank: Any) -> None:
    with pytest.raises(CriticError, match=f"lora_rank is {rank}, expected a whole number ≥ 0"):
        ValueModelCritic.for_policy(policy, ["a"], lora_rank=rank)


def test_missing_peft_is_reported(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(policy).save_pretrained(tmp_path / "critic")
    monkeypatch.setitem(sys.modules, "peft", None)
    message = r"^lora_rank=3 needs peft, which is not installed. Hint: pip install 'mavis-decoding\[lora\]', or merge"
    with pytest.raises(MissingPackageError, match=message):
        mavis.Critic.from_pretrained(tmp_path / "critic")
    with pytest.raises(MissingPackageError, match=message):
        ValueModelCritic.for_policy(policy, ["a"], lora_rank=3)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # of peft about its own settings for experts
def test_adapters_of_experts_are_merged(policy: Any) -> None:
    """Adapters of experts are nested."""
    experts = MixtralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    critic = adapted(policy, backbone=experts)
    plain = ValueModelCritic.for_policy(
        policy, ["a", "b"], hidden=8, rank=4, backbone=experts, composition="independent"
    )
    with torch.no_grad():
        before = critic.trunk(input_ids=PROMPTS).last_hidden_state
        critic.merge_lora()
        after = critic.trunk(input_ids=PROMPTS).last_hidden_state
    assert list(critic.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
