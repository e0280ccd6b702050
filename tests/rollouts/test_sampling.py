"""Settings of sampling, and one batch of responses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis.critics import TrainedDecoding
from mavis.errors import ConfigError
from mavis.policies.encoding import response_texts
from mavis.rollouts import RolloutSettings
from mavis.rollouts.sampling import sample, shard_seed

PROMPTS = ["once upon a time", "the dog"]
SETTINGS = RolloutSettings(max_new_tokens=12)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number ≥ 1. Hint: top_k=None makes every token a candidate"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutSettings(**setting)


def test_by_default_every_token_is_a_candidate_and_a_critic_stores_so() -> None:
    assert RolloutSettings().top_k is None
    assert RolloutSettings().trained_decoding() == TrainedDecoding()
    settings = RolloutSettings(max_new_tokens=9, top_k=7, temperature=0.8)
    assert settings.trained_decoding() == TrainedDecoding(top_k=7, temperature=0.8, max_new_tokens=9)


def test_more_candidates_than_tokens_are_refused(tiny_policy: Any) -> None:
    RolloutSettings(top_k=61).check(tiny_policy)
    with pytest.raises(ConfigError, match="top_k is 62, but the policy has 61 tokens"):
        RolloutSettings(top_k=62).check(tiny_policy)


def test_equal_seeds_draw_equal_responses_whatever_the_process_has_drawn(tiny_policy: Any, tiny_tokenizer: Any) -> None:
    first = sample(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 3)
    torch.rand(5)
    state = torch.get_rng_state()
    assert sample(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 4) != first


def test_prompts_come_back_without_padding_and_one_candidate_is_greedy(tiny_policy: Any, tiny_tokenizer: Any) -> None:
    prompt_ids, response_ids = sample(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 0, top_k=1)
    assert prompt_ids == [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for prompt, response in zip(prompt_ids, response_ids, strict=True):
        logits = tiny_policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response


class KeepsSpaces:
    """Decodes like tokenizers whose decoder drops the space before the first word."""

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return ["".join(f" w{token}" for token in row if token).removeprefix(" ") for row in rows]


def test_responses_are_decoded_in_context_so_that_their_leading_space_stays() -> None:
    assert response_texts(KeepsSpaces(), [[1, 2], [3]], [[4, 5], []]) == [" w4 w5", ""]


def test_every_shard_of_every_plan_has_a_seed_of_its_own() -> None:
    seeds = {shard_seed(seed, digest, index) for seed in (0, 1) for digest in ("a", "b") for index in range(3)}
    assert len(seeds) == 12
    assert shard_seed(0, "a", 0) == shard_seed(0, "a", 0)
