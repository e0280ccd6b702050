"""Recorded log-ratios against those of an independent forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis.rollouts import RolloutSettings
from mavis.rollouts.replay import Sequences, forward_sequences
from mavis.rollouts.sampler import GENERATE_SAMPLER, GenerateSampler

PROMPTS = ["once upon a time", "the dog", "he was", "she said"]
LAM = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, 2.0], [3.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        RolloutSettings(max_new_tokens=8, top_k=12),
        RolloutSettings(max_new_tokens=1, top_k=None),
        RolloutSettings(max_new_tokens=8, top_k=None, temperature=1.4),
    ],
    ids=str,
)
def test_the_log_ratio_is_that_of_the_policies_along_the_response(
    tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Any, settings: RolloutSettings
) -> None:
    critic = make_tiny_critic()
    sampler = GenerateSampler(log_ratios=True)
    drawn = sampler.draw(tiny_policy, tiny_tokenizer, PROMPTS, settings, 3, critic=critic, lam=LAM)
    sequences = Sequences.pack(drawn.prompt_ids, drawn.response_ids)
    states, logits = forward_sequences(tiny_policy, sequences)
    assert drawn.log_ratio is not None
    for row, response in enumerate(drawn.response_ids):
        expected = 0.0
        for step, token in enumerate(response):
            reference = torch.log_softmax(logits[row, step].double() / settings.temperature, dim=-1)
            if LAM[row].any():
                kept = reference.topk(settings.top_k or len(reference)).indices
                inputs = critic.response_inputs(states[row][None])[:, step]
                values = critic.values_from_inputs(inputs, kept[None])[0].detach().double()
                tilted = torch.full_like(reference, -torch.inf)
                tilted[kept] = torch.log_softmax(reference[kept] + values @ LAM[row], dim=-1)
                expected += float(tilted[token] - reference[token])
        assert float(drawn.log_ratio[row]) == pytest.approx(expected, abs=1e-4)
    if settings.max_new_tokens > 1:
        assert len({len(response) for response in drawn.response_ids}) > 1, "the rows should end at different steps"


def test_recording_changes_no_response(tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Any) -> None:
    settings = RolloutSettings(max_new_tokens=8, top_k=12)
    drawn = [
        sampler.draw(tiny_policy, tiny_tokenizer, PROMPTS, settings, 3, critic=make_tiny_critic(), lam=LAM)
        for sampler in (GENERATE_SAMPLER, GenerateSampler(log_ratios=True))
    ]
    assert drawn[0].response_ids == drawn[1].response_ids
    assert drawn[0].log_ratio is None
