"""The sampler that draws with the policy's own `generate`, and how samplers are identified."""

from __future__ import annotations

from typing import Any

import torch

from mavis.rollouts import RolloutSettings
from mavis.rollouts.sampler import GENERATE_SAMPLER, sampler_identity

PROMPTS = ["once upon a time", "the dog", "he was"]
SETTINGS = RolloutSettings(max_new_tokens=8, top_k=12)
LAM = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)


class Wraps:
    """A sampler that is no `GenerateSampler`."""

    name = "wrapped"


def test_only_other_samplers_are_named_in_a_manifest() -> None:
    assert sampler_identity(GENERATE_SAMPLER) == {}
    assert sampler_identity(Wraps()) == {"sampler": "wrapped"}  # type: ignore[arg-type]


def test_the_kl_is_known_where_a_critic_tilts_and_not_without(
    tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Any
) -> None:
    plain = GENERATE_SAMPLER.draw(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 0)
    assert plain.kl is None
    critic = make_tiny_critic()
    tilted = GENERATE_SAMPLER.draw(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 0, critic=critic, lam=LAM)
    assert tilted.kl is not None
    assert tilted.kl.shape == (3, max(map(len, tilted.response_ids)))
    assert tilted.kl.sum(1).bool().tolist() == [True, False, True]
    assert critic.attached_policy is None


def test_the_same_call_draws_the_same(tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Any) -> None:
    critic = make_tiny_critic()
    one, other = (
        GENERATE_SAMPLER.draw(tiny_policy, tiny_tokenizer, PROMPTS, SETTINGS, 5, critic=critic, lam=LAM)
        for _ in range(2)
    )
    assert one.response_ids == other.response_ids
    assert one.kl is not None
    assert other.kl is not None
    assert torch.equal(one.kl, other.kl)
