"""Returns against sums done by hand."""

from __future__ import annotations

import torch

from mavis.math.returns import reverse_cumsum_exclusive, soft_returns, whole_response_returns

STEPS = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 0.0]])


def test_the_later_sum_leaves_the_present_step_out() -> None:
    assert reverse_cumsum_exclusive(STEPS).tolist() == [[6.0, 4.0, 0.0], [5.0, 0.0, 0.0]]


def test_the_later_sum_runs_over_time_and_not_over_objectives() -> None:
    both = torch.stack([STEPS, 10 * STEPS], dim=-1)
    assert reverse_cumsum_exclusive(both).shape == (2, 3, 2)
    assert torch.equal(reverse_cumsum_exclusive(both)[..., 0], reverse_cumsum_exclusive(STEPS))
    assert torch.equal(reverse_cumsum_exclusive(both)[..., 1], 10 * reverse_cumsum_exclusive(STEPS))


def test_a_return_is_the_reward_less_the_price_of_the_kl_to_come() -> None:
    returns = soft_returns(torch.tensor([[10.0, -1.0], [0.0, 2.0]]), STEPS, 0.5)
    assert returns.shape == (2, 3, 2)
    assert returns[0].tolist() == [[7.0, -4.0], [8.0, -3.0], [10.0, -1.0]]
    assert returns[1].tolist() == [[-2.5, -0.5], [0.0, 2.0], [0.0, 2.0]]


def test_each_response_may_have_a_price_of_its_own() -> None:
    rewards, zeta = torch.tensor([[10.0], [10.0]]), torch.tensor([0.25, 2.0])
    together = soft_returns(rewards, STEPS, zeta)
    for row, price in enumerate(zeta.tolist()):
        alone = soft_returns(rewards[row : row + 1], STEPS[row : row + 1], price)
        assert torch.equal(together[row : row + 1], alone)


def test_kl_that_costs_nothing_leaves_the_reward_at_every_step() -> None:
    assert torch.equal(soft_returns(torch.tensor([[3.0]]), STEPS[:1], 0.0), torch.full((1, 3, 1), 3.0))


def test_a_return_is_the_next_one_less_the_next_steps_kl() -> None:
    kl, zeta = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)), 0.3
    returns = soft_returns(torch.ones(4, 2), kl, zeta)
    torch.testing.assert_close(returns[:, :-1], returns[:, 1:] - zeta * kl[:, 1:, None])


def test_the_log_ratio_of_a_whole_response_lowers_the_return_of_all_its_actions_alike() -> None:
    rewards, log_ratio = torch.tensor([[10.0, -1.0], [0.0, 2.0]]), torch.tensor([4.0, -2.0], dtype=torch.float64)
    assert whole_response_returns(rewards, log_ratio, 0.5).tolist() == [[8.0, -3.0], [1.0, 3.0]]


def test_inputs_stay_as_they_are() -> None:
    rewards, kl = torch.ones(2, 1), STEPS.clone()
    soft_returns(rewards, kl, 1.0).add_(5)
    assert torch.equal(kl, STEPS)
    assert torch.equal(rewards, torch.ones(2, 1))
