"""The KL of one step, against sums done by hand."""

from __future__ import annotations

import pytest
import torch

from mavis.math.kl import step_kl


def test_kl_counts_the_mass_that_truncation_leaves_out() -> None:
    reference = torch.tensor([0.5, 0.3, 0.2]).log()
    kept = torch.log_softmax(reference[:2], -1)
    assert step_kl(kept, reference[:2]).item() == pytest.approx(-torch.tensor(0.8).log().item(), abs=1e-6)


def test_kl_is_the_sum_over_allowed_tokens_and_nothing_for_banned_ones() -> None:
    logprobs = torch.tensor([[0.6, 0.4, 0.0]]).log()
    reference = torch.tensor([[0.2, 0.5, 0.3]]).log()
    by_hand = 0.6 * torch.tensor(3.0).log() + 0.4 * torch.tensor(0.8).log()
    torch.testing.assert_close(step_kl(logprobs, reference), by_hand[None])
    both_banned = torch.tensor([[0.2, 0.8, 0.0]]).log()
    assert step_kl(torch.tensor([[0.2, 0.8, 0.0]]).log(), both_banned).item() == 0.0
