"""What TRL samples while it trains: the policy's plain distribution, from prompts with one BOS token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from mavis.errors import PolicyError
from mavis.training import AlignSettings, align
from mavis.training.alignment.reinforce import reinforce

PROMPTS = ["once upon a time", "the dog", "she said", "he was"]
SETTINGS = AlignSettings(steps=2, batch_size=2, samples=2, max_new_tokens=8, learning_rate=3e-3)


def letters(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def trained(folder: Path, policy: Any, tokenizer: Any, prompts: Sequence[Any], **settings: Any) -> dict[str, Tensor]:
    """Train on prompts of whole steps, and return the weights."""
    folder.mkdir()
    reinforce(policy, tokenizer, prompts, letters, folder, replace(SETTINGS, **settings), lambda done: None)
    return load_file(folder / "checkpoint" / "weights.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_what_the_policys_own_generation_config_says_is_set_aside(
    tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path, method: str
) -> None:
    noisy = copy.deepcopy(tiny_policy)
    noise = {"num_beams": 2, "min_p": 0.2, "no_repeat_ngram_size": 1, "max_time": 1e-6, "typical_p": 0.5}
    noisy.generation_config.update(do_sample=True, return_dict_in_generate=True, **noise)
    plain = trained(tmp_path / "plain", tiny_policy, tiny_tokenizer, PROMPTS, method=method)
    assert same(trained(tmp_path / "noisy", noisy, tiny_tokenizer, PROMPTS, method=method), plain)


def test_a_prompt_that_begins_with_the_bos_token_gets_no_second_one(
    tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("<s> the dog")["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    plain = trained(tmp_path / "plain", tiny_policy, tokenizer, PROMPTS)
    begun = trained(tmp_path / "begun", tiny_policy, tokenizer, [f"<s> {prompt}" for prompt in PROMPTS])
    assert same(begun, plain)


def test_conversations_are_read_as_the_chat_template_writes_them(
    tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ '<s> ' + message['content'] }}{% endfor %}"
    plain = trained(tmp_path / "plain", tiny_policy, tokenizer, [f"<s> {prompt}" for prompt in PROMPTS])
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert same(trained(tmp_path / "asked", tiny_policy, tokenizer, asked), plain)


def test_a_generation_config_that_cannot_be_saved_is_refused_at_once(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    policy = copy.deepcopy(tiny_policy)
    policy.generation_config.temperature = 0.7
    with pytest.raises(PolicyError, match=r"cannot be saved: `temperature`.*Hint: set .*do_sample = True"):
        align(policy, tiny_tokenizer, tiny_objectives, [1.0, 0.0], PROMPTS, tmp_path / "run", SETTINGS)
    assert not (tmp_path / "run").exists()
