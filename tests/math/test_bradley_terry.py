"""Weights from choices: values computed by hand, numerical integrals, invariances, and intervals that hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mavis.errors import PreferenceError
from mavis.math.bradley_terry import SPREADS, information_gain, map_weights, posterior_draws

TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def choices(pairs: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Differences as a user with these weights leaves them, of pairs as random responses have them."""
    rows = math.sqrt(2) * torch.randn(pairs, len(weights), generator=generator, dtype=torch.float64)
    likes_first = torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(rows @ weights)
    return torch.where(likes_first[:, None], rows, -rows)


def some_choices(pairs: int, objectives: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return choices(pairs, torch.linspace(2, -1, objectives, dtype=torch.float64), generator)


def log_posterior(weights: Tensor, differences: Tensor) -> Tensor:
    """By its definition, for rows of weights."""
    size = weights.shape[1]
    prior = sum(torch.exp(-weights.square().sum(1) / (2 * spread**2)) / spread**size for spread in SPREADS)
    return torch.log(prior) + torch.nn.functional.logsigmoid(weights @ differences.T).sum(1)


# the likeliest weights


def test_one_choice_by_one_objective() -> None:
    # ŵ solves σ(−ŵ) = ŵ / s²; at s² = 1 + e that is ŵ = 1.
    weights, covariance = map_weights(table([1.0]), math.sqrt(1 + math.e))
    assert weights.item() == pytest.approx(1.0, abs=1e-12)
    chance = 1 / (1 + math.exp(-1))
    assert covariance.item() == pytest.approx(1 / (chance * (1 - chance) + 1 / (1 + math.e)), rel=1e-12)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=12),
    st.sampled_from([0.1, 1.0, 4.0, 50.0]),
)
def test_the_gradient_is_zero_at_the_likeliest_weights(rows: list[list[float]], spread: float) -> None:
    differences = table(*rows)
    weights, _ = map_weights(differences, spread)
    weights.requires_grad_(True)
    loss = torch.nn.functional.softplus(-differences @ weights).sum() + weights.square().sum() / (2 * spread**2)
    (gradient,) = torch.autograd.grad(loss, weights)
    assert float(gradient.abs().max()) < 1e-8 * (1 + float(differences.abs().sum()))


def test_the_covariance_is_the_inverse_of_the_curvature() -> None:
    differences = some_choices(7, 3)
    weights, covariance = map_weights(differences, 2.0)

    def loss(at: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-differences @ at).sum() + at.square().sum() / 8

    curvature = torch.autograd.functional.hessian(loss, weights)
    torch.testing.assert_close(covariance, torch.linalg.inv(curvature))


def test_opposite_choices_have_opposite_weights_and_permuted_objectives_permuted_ones() -> None:
    differences = some_choices(9, 4)
    weights, covariance = map_weights(differences, 2.0)
    torch.testing.assert_close(map_weights(-differences, 2.0)[0], -weights)
    order = [2, 0, 3, 1]
    permuted, its_covariance = map_weights(differences[:, order], 2.0)
    torch.testing.assert_close(permuted, weights[order])
    torch.testing.assert_close(its_covariance, covariance[order][:, order])


def test_without_choices_the_prior_is_left() -> None:
    weights, covariance = map_weights(torch.zeros(0, 2), 3.0)
    assert weights.tolist() == [0.0, 0.0]
    assert covariance.tolist() == [[9.0, 0.0], [0.0, 9.0]]


# all weights that fit


def test_draws_without_choices_are_those_of_the_prior() -> None:
    draws = posterior_draws(torch.zeros(0, 3))
    assert draws.shape == (4096, 3)
    assert draws.mean(0).tolist() == pytest.approx([0.0] * 3, abs=0.15)
    expected = sum(spread**2 for spread in SPREADS) / len(SPREADS)
    assert torch.cov(draws.T).diagonal().tolist() == pytest.approx([expected] * 3, rel=0.1)


@pytest.mark.parametrize(
    "differences", [table([1.0]), table([2.0], [1.0], [-0.5]), table([30.0]), table(*[[0.1], [-0.1]] * 20)]
)
def test_one_objective_agrees_with_the_integral(differences: Tensor) -> None:
    axis = torch.linspace(-25, 25, 20001, dtype=torch.float64)
    shares = torch.softmax(log_posterior(axis[:, None], differences), dim=0)
    mean, ends = (shares * axis).sum(), axis[torch.searchsorted(shares.cumsum(0), TAILS)]
    width = float(ends[1] - ends[0])
    draws = posterior_draws(differences)
    assert draws.mean().item() == pytest.approx(mean.item(), abs=0.02 * width)
    assert torch.quantile(draws[:, 0], TAILS).tolist() == pytest.approx(ends.tolist(), abs=0.05 * width)


def test_two_objectives_agree_with_the_integral() -> None:
    differences = some_choices(10, 2, seed=3)
    axis = torch.linspace(-20, 20, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    shares = torch.softmax(log_posterior(grid, differences), dim=0)
    mean = shares @ grid
    covariance = (grid - mean).T @ ((grid - mean) * shares[:, None])
    draws = posterior_draws(differences)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(draws.T), covariance, rtol=0.1, atol=0.1)


def test_draws_are_the_same_every_time_and_touch_nothing() -> None:
    differences = some_choices(5, 2)
    before, state = differences.clone(), torch.random.get_rng_state()
    first = posterior_draws(differences)
    torch.manual_seed(123)
    assert torch.equal(posterior_draws(differences), first)
    assert torch.equal(differences, before)
    torch.random.set_rng_state(state)
    posterior_draws(differences)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("pairs", "objectives"), [(3, 2), (10, 4), (40, 4), (10, 8)])
def test_names_signs_and_order_do_not_matter(pairs: int, objectives: int) -> None:
    differences = some_choices(pairs, objectives)
    draws = posterior_draws(differences)
    mean, error = draws.mean(0), 0.2 * draws.std(0)
    order = torch.randperm(objectives, generator=torch.Generator().manual_seed(1))
    assert bool(((posterior_draws(differences[:, order]).mean(0) - mean[order]).abs() < error[order]).all())
    assert bool(((posterior_draws(-differences).mean(0) + mean).abs() < error).all())
    assert bool(((posterior_draws(differences.flip(0)).mean(0) - mean).abs() < error).all())


def test_intervals_shrink_with_choices() -> None:
    differences = some_choices(160, 3)
    ends = [torch.quantile(posterior_draws(differences[:pairs]), TAILS, dim=0) for pairs in (0, 10, 160)]
    before, few, many = [float((high - low).mean()) for low, high in ends]
    assert few < 0.8 * before
    assert many < 0.5 * few


def test_what_no_pair_differs_on_stays_unknown() -> None:
    differences = some_choices(10, 2)
    differences[:, 1] = 0.0
    ends = torch.quantile(posterior_draws(differences), TAILS, dim=0)
    assert ends[0, 1] < -2 < 2 < ends[1, 1]
    assert ends[0, 1].item() == pytest.approx(-ends[1, 1].item(), rel=0.15)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Users drawn from the prior: Bayes' intervals then cover 95 % exactly, whatever the pairs.

    One weight of each of 400 users, so that the trials are independent; a sound sampler would fail for one seed in
    100,000.
    """
    users, generator = 400, torch.Generator().manual_seed(7)
    covered = 0
    for user in range(users):
        spread = SPREADS[user % len(SPREADS)]
        weights = spread * torch.randn(3, generator=generator, dtype=torch.float64)
        low, high = torch.quantile(posterior_draws(choices(10, weights, generator))[:, 0], TAILS)
        covered += int(low <= weights[0] <= high)
    chances = [math.comb(users, k) * 0.95**k * 0.05 ** (users - k) for k in range(users + 1)]
    assert sum(chances[: covered + 1]) > 5e-6
    assert sum(chances[covered:]) > 5e-6


# which answer would tell most


def test_the_gain_of_a_pair_by_hand() -> None:
    draws = table([math.log(3)], [-math.log(3)])  # the answer's chance is ¾ or ¼
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    gains = information_gain(table([1.0], [-1.0], [0.0], [1000.0]), draws)
    assert gains.tolist() == pytest.approx([math.log(2) - entropy] * 2 + [0.0, math.log(2)], abs=1e-12)


def test_each_pair_is_judged_by_itself() -> None:
    candidates, draws = some_choices(70, 3), posterior_draws(some_choices(5, 3, seed=2))
    alone = torch.cat([information_gain(row[None], draws) for row in candidates])
    torch.testing.assert_close(information_gain(candidates, draws), alone)
    torch.testing.assert_close(information_gain(-candidates, draws), alone)
    assert 0 <= float(alone.min()) <= float(alone.max()) <= math.log(2)


def test_asking_where_most_is_to_be_learnt_errs_less() -> None:
    generator = torch.Generator().manual_seed(0)
    angles: dict[str, list[float]] = {"random": [], "chosen": []}
    for user in range(20):
        weights = SPREADS[user % len(SPREADS)] * torch.randn(3, generator=generator, dtype=torch.float64)
        pool = math.sqrt(2) * torch.randn(32, 3, generator=generator, dtype=torch.float64)
        luck = torch.rand(6, generator=generator)
        for how, found in angles.items():
            draws, answered, left = posterior_draws(pool[:0]), pool[:0], list(range(len(pool)))
            for chance in luck:
                best = int(information_gain(pool[left], draws).argmax()) if how == "chosen" else 0
                row = pool[left.pop(best)]
                answered = torch.cat([answered, (row if chance < torch.sigmoid(row @ weights) else -row)[None]])
                draws = posterior_draws(answered)
            found.append(math.degrees(math.acos(float(torch.cosine_similarity(draws.mean(0), weights, dim=0)))))
    assert sum(angles["chosen"]) < 0.8 * sum(angles["random"])


# what is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2), r"shape \(2,\), expected one row per pair"),
        (torch.zeros(3, 0), r"shape \(3, 0\), expected one row per pair"),
        (table([0.0, 1.0], [math.nan, 0.0]), "is nan in row 1, column 0, expected finite numbers"),
        (table([0.0, -math.inf]), "is -inf in row 0, column 1, expected finite numbers"),
    ],
)
def test_what_is_no_table_of_finite_numbers_is_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(PreferenceError, match=f"differences .*{message}.* Hint: "):
        map_weights(rows, 1.0)
    with pytest.raises(PreferenceError, match=f"differences .*{message}"):
        posterior_draws(rows)
    with pytest.raises(PreferenceError, match=f"candidates .*{message}"):
        information_gain(rows, table([1.0]))


def test_candidates_and_weights_of_other_objectives_are_refused() -> None:
    with pytest.raises(PreferenceError, match="candidates has 2 columns, but the weights are of 3 objectives"):
        information_gain(torch.zeros(4, 2), torch.zeros(5, 3))


def test_more_objectives_than_can_be_drawn_for_are_refused() -> None:
    with pytest.raises(PreferenceError, match="effective draws were found, expected at least 400. Hint: give fewer"):
        posterior_draws(some_choices(10, 48))


@pytest.mark.parametrize("size", [1e6, -1e200])
def test_differences_that_no_reward_can_have_are_refused(size: float) -> None:
    with pytest.raises(
        PreferenceError, match=r"in row 1, column 0, expected less than 1000000: its unit is a standard"
    ):
        posterior_draws(table([0.0, 1.0], [size, 0.0]))
    with pytest.raises(PreferenceError, match="candidates is .* its unit is a standard deviation"):
        information_gain(table([size]), table([1.0]))
