"""The KL between two policies along responses, against what one forward pass a response gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mavis.rollouts.policy_kl import response_kl
from mavis.rollouts.replay import Sequences

PROMPTS = [[25, 26, 12], [12, 20], [30, 31, 32, 33, 34], [40]]
RESPONSES = [[5, 6, 7, 2], [8], [9, 10, 11, 12, 13, 14], [15, 2]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_is_the_sum_over_the_steps_of_each_response_alone(
    tiny_policy: Any, make_other_policy: Callable[[], Any], temperature: float
) -> None:
    other = make_other_policy()
    found = response_kl(tiny_policy, other, Sequences.pack(PROMPTS, RESPONSES), temperature=temperature)
    for kl, prompt, response in zip(found.tolist(), PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logprobs, others = (
            torch.log_softmax(policy(ids).logits[0, len(prompt) - 1 : -1].double() / temperature, -1)
            for policy in (tiny_policy, other)
        )
        assert kl == pytest.approx(float((logprobs.exp() * (logprobs - others)).sum()), rel=1e-4)


def test_a_policy_is_no_distance_from_itself(tiny_policy: Any) -> None:
    assert not response_kl(tiny_policy, tiny_policy, Sequences.pack(PROMPTS, RESPONSES)).any()


def test_reading_a_few_rows_at_a_time_changes_nothing(
    tiny_policy: Any, make_other_policy: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, other = Sequences.pack(PROMPTS, RESPONSES), make_other_policy()
    whole = response_kl(tiny_policy, other, sequences)
    monkeypatch.setattr("mavis.rollouts.policy_kl.rows_per_chunk", lambda *_: 3)
    torch.testing.assert_close(response_kl(tiny_policy, other, sequences), whole, rtol=1e-5, atol=1e-6)


def test_it_is_the_mean_log_ratio_of_samples(tiny_policy: Any, make_other_policy: Callable[[], Any]) -> None:
    """Σ log π/π_ref of sampled tokens has the same mean; 5 standard errors: a false alarm in two million."""
    other, rows = make_other_policy(), 2000
    torch.manual_seed(0)
    prompt = torch.tensor([[12, 20]]).expand(rows, -1)
    output = tiny_policy.generate(prompt, do_sample=True, top_k=0, max_new_tokens=3, eos_token_id=None)
    sequences = Sequences.pack(prompt.tolist(), output[:, 2:].tolist())
    kl = response_kl(tiny_policy, other, sequences)
    taken = torch.zeros(rows, dtype=torch.float64)
    with torch.no_grad():
        for policy, sign in ((tiny_policy, 1), (other, -1)):
            logprobs = torch.log_softmax(policy(output).logits[:, 1:-1].double(), -1)
            taken += sign * logprobs.gather(2, output[:, 2:, None]).sum((1, 2))
    difference = taken - kl
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / math.sqrt(rows)
