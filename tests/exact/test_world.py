"""A world's states, rewards and dynamic programming against a sum over every response."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor

from mavis.errors import ConfigError
from mavis.exact import (
    WORLD_KINDS,
    World,
    evaluate_tilt,
    normalised_gain,
    optimal_tilt,
    policy_iteration,
    regularised_return,
)


def every_response(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """All (prompt, response) pairs: tokens (N, T + 1), log π_ref (N,) given the prompt, final counts (N,)."""
    tokens = torch.cartesian_prod(*[torch.arange(world.tokens)] * (world.steps + 1))
    logprobs = world.logprobs[tokens[:, :-1], tokens[:, 1:]].sum(1)
    counts = torch.zeros(len(tokens), dtype=torch.long)
    for step in range(world.steps):
        counts = world.next_counts[counts, tokens[:, step + 1]]
    return tokens, logprobs, counts


@pytest.fixture(scope="module", params=sorted(WORLD_KINDS))
def small(request: pytest.FixtureRequest) -> World:
    return World.random(request.param, seed=3, tokens=10, steps=4)


def random_tilt(world: World, seed: int = 0) -> Tensor:
    shape = world.steps, len(world.rewards), world.tokens, world.tokens
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_counts_go_up_by_the_tokens_that_a_counter_counts_and_stop_at_its_cap() -> None:
    counted = torch.tensor([[True, False, True], [False, False, True]])
    world = World(torch.full((3, 3), 1 / 3).log().double(), counted, (1, 2), torch.zeros(6, 1).double(), 4)
    # States in order: (0,0), (0,1), (0,2), (1,0), (1,1), (1,2).
    assert world.next_counts.tolist() == [[3, 0, 4], [4, 1, 5], [5, 2, 5], [3, 3, 4], [4, 4, 5], [5, 5, 5]]


def test_counts_agree_with_counting(small: World) -> None:
    tokens, _, counts = every_response(small)
    by_hand = torch.stack([small.counted[c][tokens[:, 1:]].sum(1) for c in range(len(small.caps))], dim=1)
    by_hand = by_hand.minimum(torch.tensor(small.caps))
    grid = torch.cartesian_prod(*(torch.arange(cap + 1) for cap in small.caps)).reshape(-1, len(small.caps))
    assert torch.equal(grid[counts], by_hand)


def test_rewards_have_mean_0_and_deviation_1_under_the_reference(small: World) -> None:
    _, logprobs, counts = every_response(small)
    probabilities = logprobs.exp() / small.tokens
    rewards = small.rewards[counts]
    mean = probabilities @ rewards
    torch.testing.assert_close(mean, torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(probabilities @ rewards.square(), torch.ones(2, dtype=torch.float64))
    occupancy = torch.zeros(len(small.rewards), dtype=torch.float64).index_add_(0, counts, probabilities)
    torch.testing.assert_close(small.occupancy(), occupancy)


def test_rewards_and_kl_of_a_tilt_are_the_sum_over_every_response(small: World) -> None:
    tilt = random_tilt(small)
    tokens, reference, counts = every_response(small)
    logprobs, state = torch.zeros_like(reference), torch.zeros_like(counts)
    for step in range(small.steps):
        last, token = tokens[:, step], tokens[:, step + 1]
        tilted = torch.log_softmax(small.logprobs[last] + tilt[step, state, last], dim=-1)
        logprobs += tilted.gather(1, token[:, None])[:, 0]
        state = small.next_counts[state, token]
    probabilities = logprobs.exp() / small.tokens
    evaluation = evaluate_tilt(small, tilt)
    torch.testing.assert_close(evaluation.rewards, probabilities @ small.rewards[counts])
    torch.testing.assert_close(evaluation.kl, probabilities @ (logprobs - reference))


def test_values_are_the_expected_rewards_and_kl_after_a_token(small: World) -> None:
    tilt = random_tilt(small)
    evaluation = evaluate_tilt(small, tilt)
    assert evaluation.values.shape == (small.steps, len(small.rewards), small.tokens, small.objectives)
    torch.testing.assert_close(evaluation.values[-1], small.rewards[small.next_counts])
    assert evaluation.kl_to_come[-1].abs().max() == 0
    first = torch.log_softmax(small.logprobs + tilt[0, 0], dim=-1).exp()  # (last, token)
    torch.testing.assert_close((first @ evaluation.values[0, 0]).mean(0), evaluation.rewards)
    step_kl = (first * (first.log() - small.logprobs)).sum(-1)
    torch.testing.assert_close((first @ evaluation.kl_to_come[0, 0] + step_kl).mean(), evaluation.kl)


def test_rewards_and_kl_are_values_plus_later_advantages_whatever_chose_the_tokens(small: World) -> None:
    """The identity by which rollouts of one policy teach the values of another: no token below is sampled."""
    tilt = random_tilt(small)
    found = evaluate_tilt(small, tilt)
    tokens, _, counts = every_response(small)
    at, returns, kl = torch.zeros(len(tokens), dtype=torch.long), [], []
    advantages, surprises = [], []
    for step in range(small.steps):
        last, taken = tokens[:, step], tokens[:, step + 1]
        logprobs = torch.log_softmax(small.logprobs[last] + tilt[step, at, last], dim=-1)
        values, to_come = found.values[step, at], found.kl_to_come[step, at]  # (N, V, M), (N, V)
        row = torch.arange(len(tokens))
        returns.append(values[row, taken])
        advantages.append(values[row, taken] - (logprobs.exp()[:, :, None] * values).sum(1))
        kl.append((logprobs.exp() * (logprobs - small.logprobs[last])).sum(1))
        surprises.append(to_come[row, taken] - (logprobs.exp() * to_come).sum(1))
        at = small.next_counts[at, taken]
    for step in range(small.steps):
        torch.testing.assert_close(returns[step] + sum(advantages[step + 1 :]), small.rewards[counts])
        to_come = found.kl_to_come[step][_counts_before(small, tokens, step), tokens[:, step + 1]]
        later = sum(kl[step + 1 :], torch.zeros(len(tokens), dtype=torch.float64))
        torch.testing.assert_close(to_come + sum(surprises[step + 1 :]), later)


def _counts_before(world: World, tokens: Tensor, step: int) -> Tensor:
    counts = torch.zeros(len(tokens), dtype=torch.long)
    for earlier in range(step):
        counts = world.next_counts[counts, tokens[:, earlier + 1]]
    return counts


def test_the_optimum_reweighs_every_response_by_its_reward(small: World) -> None:
    lam = torch.tensor([2.0, 1.0], dtype=torch.float64)
    tilt, best = optimal_tilt(small, lam)
    tokens, reference, counts = every_response(small)
    gains = reference + small.rewards[counts] @ lam
    by_prompt = torch.stack([gains[tokens[:, 0] == prompt].logsumexp(0) for prompt in range(small.tokens)])
    torch.testing.assert_close(best, by_prompt.mean())
    torch.testing.assert_close(regularised_return(evaluate_tilt(small, tilt), lam), best)
    assert normalised_gain(small, tilt, lam) == pytest.approx(1.0, abs=1e-12)
    assert normalised_gain(small, torch.zeros_like(tilt), lam) == 0.0


@pytest.mark.parametrize("kind", sorted(WORLD_KINDS))
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("first_weight", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("beta", [2.0, 5.0])
def test_conditioned_iteration_never_loses_and_reaches_the_optimum(
    kind: str, seed: int, first_weight: float, beta: float
) -> None:
    world = World.random(kind, seed)
    weights = torch.tensor([first_weight, 1 - first_weight])
    shares = [
        normalised_gain(world, tilt, beta * weights)
        for tilt in islice(policy_iteration(world, weights, beta, "conditioned"), 5)
    ]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(shares)), shares
    assert shares[4] >= 0.999


@pytest.mark.parametrize("objective", [0, 1])
def test_with_one_objective_independent_iteration_is_the_conditioned_one_and_reaches_the_optimum(
    objective: int,
) -> None:
    world = World.random("conflicting", seed=1)
    alone = World(world.logprobs, world.counted, world.caps, world.rewards[:, [objective]], world.steps)
    weights = torch.ones(1)
    pairs = zip(
        islice(policy_iteration(alone, weights, 5.0, "independent"), 6),
        islice(policy_iteration(alone, weights, 5.0, "conditioned"), 6),
        strict=True,
    )
    for independent, conditioned in pairs:
        torch.testing.assert_close(independent, conditioned)
    assert normalised_gain(alone, independent, torch.tensor([5.0])) >= 0.9999


def test_independent_iteration_can_make_a_mixture_worse_while_it_makes_each_objective_better() -> None:
    beta, lost, kept = 5.0, [], []
    for seed in range(5):
        world = World.random("conflicting", seed)
        for weights, found in (([0.5, 0.5], lost), ([1.0, 0.0], kept)):
            w = torch.tensor(weights)
            shares = [
                normalised_gain(world, tilt, beta * w)
                for tilt in islice(policy_iteration(world, w, beta, "independent"), 6)
            ]
            found.append(shares[5] - shares[0])
    assert sum(lost) / 5 < 0 < min(kept)


def test_the_first_tilt_of_either_composition_weighs_the_reference_policys_values() -> None:
    world, weights = World.random("product", seed=0), torch.tensor([0.3, 0.7], dtype=torch.float64)
    nothing = torch.zeros(world.steps, len(world.rewards), 1, world.tokens, dtype=torch.float64)
    by_hand = 4.0 * (evaluate_tilt(world, nothing).values @ weights)[:, :, None, :]
    for composition in ("independent", "conditioned"):
        torch.testing.assert_close(next(policy_iteration(world, weights, 4.0, composition)), by_hand)  # type: ignore[arg-type]


def test_an_unknown_kind_and_too_small_a_world_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kind is 'cooperative'.*known: agreeing, conflicting, linear, product"):
        World.random("cooperative", 0)
    with pytest.raises(ConfigError, match="tokens is 4, expected a whole number ≥ 10"):
        World.random("linear", 0, tokens=4)
    with pytest.raises(ConfigError, match="steps is 3, expected a whole number ≥ 4"):
        World.random("linear", 0, steps=3)


def test_rewards_that_never_vary_are_refused() -> None:
    world = World.random("linear", 0)
    constant = World(world.logprobs, world.counted, world.caps, torch.ones_like(world.rewards), world.steps)
    with pytest.raises(ConfigError, match="rewards have standard deviations .*, expected > 0"):
        constant.normalised()
