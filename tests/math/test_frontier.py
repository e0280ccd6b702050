from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis.errors import EvaluationError
from mavis.math.frontier import frontier_efficiency, optimal_frontier, optimal_reward_at, reward_at

BETAS = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 5.0])


def two_point(share: float, rollouts: int = 1000, prompts: int = 1) -> torch.Tensor:
    """(P, N) rewards: `share` of the rollouts of every prompt score 1, the rest 0."""
    rewards = torch.zeros(prompts, rollouts)
    rewards[:, : round(share * rollouts)] = 1.0
    return rewards


def two_point_limit(share: float, beta: float) -> tuple[float, float]:
    """Reward and KL of the tilted two-point distribution in closed form."""
    p = share * math.exp(beta) / (share * math.exp(beta) + 1 - share)
    return p, p * math.log(p / share) + (1 - p) * math.log((1 - p) / (1 - share))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_two_point_rewards_follow_the_closed_form(share: float) -> None:
    frontier = optimal_frontier(two_point(share, prompts=3), BETAS)
    for index, beta in enumerate(BETAS.tolist()):
        reward, kl = two_point_limit(share, beta)
        assert float(frontier.reward[index]) == pytest.approx(reward, abs=1e-12)
        assert float(frontier.kl[index]) == pytest.approx(kl, abs=1e-12)
        effective = 1000 / (reward**2 / share + (1 - reward) ** 2 / (1 - share))
        assert float(frontier.effective_sample_size[index]) == pytest.approx(effective)


def test_every_tensor_is_float64_and_per_beta() -> None:
    frontier = optimal_frontier(two_point(0.5).half(), BETAS)
    for tensor in (frontier.beta, frontier.reward, frontier.kl, frontier.effective_sample_size):
        assert tensor.dtype == torch.float64
        assert tensor.shape == BETAS.shape
    assert optimal_frontier(two_point(0.5), torch.empty(0)).reward.shape == (0,)


@pytest.mark.parametrize("beta", [0.01, 0.7, 3.0])
def test_optimal_reward_at_inverts_the_closed_form(beta: float) -> None:
    reward, kl = two_point_limit(0.3, beta)
    assert optimal_reward_at(two_point(0.3), kl) == pytest.approx(reward, abs=1e-9)


def test_gaussian_rewards_gain_the_root_of_twice_the_kl() -> None:
    # Exact quantiles stand for a very large sample: the limit of a normal reward is mean + std·√(2·KL).
    quantiles = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for kl in (0.05, 0.5, 1.5):
        assert optimal_reward_at(7.0 + 3.0 * quantiles[None], kl) == pytest.approx(
            7.0 + 3.0 * math.sqrt(2 * kl), rel=2e-3
        )


def test_prompts_are_tilted_one_by_one_and_never_pooled() -> None:
    # All rollouts of a prompt score the same, so no policy gains; pooled, the limit would pick a prompt.
    rewards = torch.tensor([[0.0] * 100, [1.0] * 100])
    frontier = optimal_frontier(rewards, BETAS)
    assert torch.allclose(frontier.reward, torch.full((6,), 0.5).double())
    assert torch.allclose(frontier.kl, torch.zeros(6).double(), atol=1e-12)
    assert float(optimal_frontier(rewards.reshape(1, -1), BETAS).reward[-1]) > 0.99
    assert optimal_reward_at(rewards, 0.1) == 0.5


def test_one_beta_serves_all_prompts_and_figures_are_means_over_prompts() -> None:
    rewards = torch.cat([two_point(0.2), two_point(0.6)])
    both, first, second = (optimal_frontier(part, BETAS) for part in (rewards, rewards[:1], rewards[1:]))
    assert torch.allclose(both.reward, (first.reward + second.reward) / 2)
    assert torch.allclose(both.kl, (first.kl + second.kl) / 2)
    assert torch.equal(
        both.effective_sample_size, torch.minimum(first.effective_sample_size, second.effective_sample_size)
    )


reward_tables = st.integers(1, 4).flatmap(
    lambda prompts: st.lists(
        st.lists(st.floats(-10, 10), min_size=6, max_size=6), min_size=prompts, max_size=prompts
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
)


@settings(max_examples=50)
@given(reward_tables)
def test_reward_and_kl_grow_with_beta_and_the_effective_sample_shrinks(rewards: torch.Tensor) -> None:
    frontier = optimal_frontier(rewards, torch.linspace(0, 20, 30))
    assert bool((frontier.reward.diff() >= -1e-9).all())
    assert bool((frontier.kl.diff() >= -1e-9).all())
    assert bool((frontier.effective_sample_size.diff() <= 1e-9).all())
    assert float(frontier.kl[0]) == pytest.approx(0.0, abs=1e-12)
    assert float(frontier.kl[-1]) <= math.log(6) + 1e-9
    assert float(frontier.reward[0]) == pytest.approx(float(rewards.mean()), abs=1e-9)


@settings(max_examples=50)
@given(reward_tables, st.floats(0.01, 3.0), st.floats(-100, 100))
def test_optimal_reward_at_agrees_with_the_frontier_and_moves_with_the_rewards(
    rewards: torch.Tensor, beta: float, shift: float
) -> None:
    frontier = optimal_frontier(rewards, torch.tensor([beta]))
    kl = float(frontier.kl)
    if kl < 1e-6 or float(optimal_frontier(rewards, torch.tensor([1e6])).kl) - kl < 1e-6:
        return
    reward = optimal_reward_at(rewards, kl, min_effective_sample_size=1.0)
    assert reward == pytest.approx(float(frontier.reward), abs=1e-4)
    assert optimal_reward_at(rewards + shift, kl, 1.0) == pytest.approx(reward + shift, abs=1e-4)


@settings(max_examples=50)
@given(reward_tables, st.data())
def test_no_other_policy_beats_the_frontier(rewards: torch.Tensor, data: st.DataObject) -> None:
    size = rewards.numel()
    logits = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size)))
    policy = torch.softmax(logits.double().reshape(rewards.shape), dim=1)
    gain = float((policy * rewards).sum(1).mean())
    kl = float((policy * (policy * rewards.shape[1]).log()).sum(1).mean())
    # Weak duality for every β: reward − KL/β is largest at the tilted policy.
    frontier = optimal_frontier(rewards, torch.tensor([0.3, 1.0, 4.0]))
    bound = frontier.reward - frontier.kl / frontier.beta
    assert bool((gain - kl / frontier.beta <= bound + 1e-9).all())


def test_kl_zero_is_the_reference() -> None:
    assert optimal_reward_at(two_point(0.3), 0.0) == pytest.approx(0.3)


def test_too_small_an_effective_sample_size_is_refused_with_its_figure_and_a_way_out() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(4, 500)
    assert optimal_reward_at(rewards, 0.3) > 0.5
    with pytest.raises(EvaluationError, match=r"sample size of \d+\.\d of 500 .* 50 are needed") as caught:
        optimal_reward_at(rewards, 2.5)
    assert caught.value.hint == "draw more reference rollouts or stop at a smaller KL."
    assert optimal_reward_at(rewards, 2.5, min_effective_sample_size=1.0) > 1.5
    with pytest.raises(EvaluationError, match="effective sample size"):
        optimal_reward_at(rewards[:, :40], 0.0)


def test_one_prompt_alone_can_make_the_effective_sample_size_too_small() -> None:
    # Nearly all of the KL is spent on the second prompt, whose best rollout is alone far above the rest.
    rewards = torch.cat([0.01 * torch.randn(1, 1000), two_point(0.001)])
    with pytest.raises(EvaluationError, match="for one prompt"):
        optimal_reward_at(rewards, 3.0)


@pytest.mark.parametrize("kl", [1.21, math.log(1000), 50.0])
def test_a_budget_beyond_what_the_best_reward_costs_buys_nothing_more(kl: float) -> None:
    # log(1 / 0.3) = 1.204: all the weight lies on the 300 rollouts that score 1.
    assert optimal_reward_at(two_point(0.3), kl) == 1.0
    with pytest.raises(EvaluationError, match=r"reach less than 1\.204 nats.*draw more reference rollouts"):
        optimal_reward_at(two_point(0.3), kl, min_effective_sample_size=301)


def test_a_best_reward_that_few_rollouts_share_is_no_limit() -> None:
    with pytest.raises(EvaluationError, match=r"reach less than 3\.219 nats"):
        optimal_reward_at(two_point(0.04), 4.0)


@pytest.mark.parametrize("kl", [-0.1, math.nan, math.inf])
def test_a_kl_that_is_no_kl_is_refused(kl: float) -> None:
    with pytest.raises(EvaluationError, match="kl is .*, expected a finite number ≥ 0"):
        optimal_reward_at(two_point(0.3), kl)


@pytest.mark.parametrize(
    "rewards",
    [torch.zeros(5), torch.zeros(0, 5), torch.tensor([[0.0, math.nan]]), torch.tensor([[math.inf]])],
)
def test_rewards_that_cannot_be_used_are_refused(rewards: torch.Tensor) -> None:
    with pytest.raises(EvaluationError, match="rewards must be"):
        optimal_frontier(rewards, BETAS)


@pytest.mark.parametrize("betas", [torch.tensor(1.0), torch.tensor([-1.0]), torch.tensor([math.nan])])
def test_betas_that_cannot_be_used_are_refused(betas: torch.Tensor) -> None:
    with pytest.raises(EvaluationError, match="betas must be"):
        optimal_frontier(two_point(0.5), betas)


def test_reward_at_interpolates_between_neighbours_in_any_order() -> None:
    kl, rewards = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.5, 0.0, 1.0])
    assert reward_at(kl, rewards, 0.25) == pytest.approx(0.25)
    assert reward_at(kl, rewards, 1.5) == pytest.approx(1.25)
    for point, reward in zip(kl.tolist(), rewards.tolist(), strict=True):
        assert reward_at(kl, rewards, point) == reward


def test_reward_at_never_extrapolates() -> None:
    kl, rewards = torch.tensor([0.5, 2.0]), torch.tensor([0.2, 1.5])
    assert reward_at(kl, rewards, 0.4999) is None
    assert reward_at(kl, rewards, 2.0001) is None
    assert reward_at(torch.empty(0), torch.empty(0), 0.0) is None


def test_points_of_equal_kl_count_as_one() -> None:
    kl, rewards = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])
    assert reward_at(kl, rewards, 1.0) == pytest.approx(2.0)
    assert reward_at(kl, rewards, 0.5) == pytest.approx(1.0)


def test_reward_at_refuses_what_it_cannot_read() -> None:
    with pytest.raises(EvaluationError, match="must both be"):
        reward_at(torch.zeros(2), torch.zeros(3), 0.0)
    with pytest.raises(EvaluationError, match="must be finite"):
        reward_at(torch.tensor([0.0, math.nan]), torch.zeros(2), 0.0)


def test_frontier_efficiency_is_the_share_of_the_reachable_gain() -> None:
    assert frontier_efficiency(ours=1.5, reference=1.0, optimal=2.0) == pytest.approx(0.5)
    assert frontier_efficiency(ours=0.5, reference=1.0, optimal=2.0) == pytest.approx(-0.5)


@pytest.mark.parametrize("optimal", [1.0, 0.5])
def test_frontier_efficiency_without_a_reachable_gain_is_refused(optimal: float) -> None:
    with pytest.raises(EvaluationError, match="not above the reference"):
        frontier_efficiency(1.0, 1.0, optimal)


def test_frontier_efficiency_refuses_nan() -> None:
    with pytest.raises(EvaluationError, match="finite rewards"):
        frontier_efficiency(math.nan, 0.0, 1.0)
