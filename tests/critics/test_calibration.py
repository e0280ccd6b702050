"""The conversion of a KL budget to β."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis.critics import Calibration
from mavis.critics.calibration import DEFAULT_KL, calibration_directions
from mavis.errors import CriticError

BETAS = [0.5, 1.0, 2.0, 4.0, 8.0]


def quadratic(spread: torch.Tensor) -> Calibration:
    """The calibration of a critic whose KL is exactly ½ λᵀ Σ λ."""
    rows = [[float(0.5 * b**2 * d @ spread @ d) for b in BETAS] for d in calibration_directions(len(spread))]
    return Calibration(BETAS, rows, max_new_tokens=64, top_k=None)


@given(st.integers(1, 4), st.integers(0, 1000), st.floats(0.05, 2.0))
def test_quadratic_kl_gives_the_exact_beta_for_any_weights(objectives: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(objectives, objectives, generator=generator, dtype=torch.float64)
    spread = root @ root.T + torch.eye(objectives, dtype=torch.float64)
    calibration = quadratic(spread)
    target = share * calibration.max_kl()
    weights = torch.randn(objectives, generator=generator, dtype=torch.float64)
    exact = (2 * target / float(weights @ spread @ weights)) ** 0.5
    if exact * float(weights.abs().sum()) > BETAS[-1]:
        with pytest.raises(CriticError, match="was calibrated up to"):
            calibration.beta(weights, target)
    else:
        assert calibration.beta(weights, target) == pytest.approx(exact, rel=1e-6)


def test_cancelling_objectives_do_not_weaken_each_alone() -> None:
    """Two opposed objectives: each alone moves the policy far, but together they cancel."""
    alone, both = [0.1, 0.4, 1.6, 6.0, 20.0], [0.0, 0.0, 0.0, 0.0, 0.01]
    calibration = Calibration(BETAS, [alone, alone, both], 64, 40)
    assert calibration.beta(torch.tensor([1.0, 0.0]), 6.0) == pytest.approx(4.0)
    assert calibration.default_beta(torch.tensor([1.0, 0.0])) == pytest.approx(
        calibration.beta(torch.tensor([1.0, 0.0]), 2.0)
    )
    assert calibration.default_beta(torch.tensor([0.5, 0.5])) == 8.0
    with pytest.raises(CriticError, match="the critic was calibrated up to 8"):
        calibration.beta(torch.tensor([0.5, 0.5]), 2.0)


def test_beta_interpolates_the_measured_points_by_a_power_law() -> None:
    calibration = Calibration(BETAS, [[0.1, 0.4, 1.5, 5.0, 14.0]], 64, 40)
    one = torch.tensor([1.0])
    assert calibration.beta(one, 1.5) == pytest.approx(2.0)
    assert calibration.beta(one, 5.0) == pytest.approx(4.0)
    assert calibration.beta(one, (1.5 * 5.0) ** 0.5) == pytest.approx(8.0**0.5)
    assert calibration.beta(2 * one, 1.5) == pytest.approx(1.0)  # only β·w counts
    assert calibration.beta(one, 0.025) == pytest.approx(0.25)  # below the sweep KL is quadratic


def test_beta_is_monotone_in_spite_of_sampling_noise() -> None:
    calibration = Calibration(BETAS, [[0.1, 0.5, 0.45, 2.0, 1.9]], 64, 40)
    assert calibration.max_kl() == 2.0
    betas = [calibration.beta(torch.tensor([1.0]), target) for target in (0.2, 0.5, 1.0, 2.0)]
    assert betas == sorted(betas)


@pytest.mark.parametrize(
    ("target", "message"), [(14.5, "calibrated up to 8"), (float("nan"), "target_kl is nan"), (-1.0, "target_kl is -1")]
)
def test_budget_outside_the_measured_range_is_refused(target: float, message: str) -> None:
    with pytest.raises(CriticError, match=message):
        Calibration(BETAS, [[0.1, 0.4, 1.5, 5.0, 14.0]], 64, 40).beta(torch.tensor([1.0]), target)


def test_default_beta_aims_at_the_default_kl_within_the_measured_range() -> None:
    equal = torch.tensor([0.5, 0.5])
    beta = quadratic(torch.eye(2, dtype=torch.float64)).default_beta(equal)
    assert 0.5 * beta**2 * 0.5 == pytest.approx(DEFAULT_KL)
    one = torch.tensor([2.0])
    assert Calibration(BETAS, [[0.01, 0.02, 0.05, 0.1, 0.2]], 64, 40).default_beta(one) == pytest.approx(4.0)
    assert Calibration(BETAS, [[0.0] * 5], 64, 40).default_beta(one) == pytest.approx(4.0)  # an untrained critic


@pytest.mark.parametrize(
    ("betas", "kl"), [([1.0, 2.0], [[0.1]]), ([2.0, 1.0], [[0.1, 0.2]]), ([1.0], [["x"]]), ([1.0], []), ([1.0], None)]
)
def test_malformed_sweeps_are_refused(betas: Any, kl: Any) -> None:
    with pytest.raises(CriticError, match="calibration is betas="):
        Calibration(betas, kl, 64, 40)


def test_directions_are_single_objectives_then_pairs() -> None:
    assert calibration_directions(3).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0.5, 0.5, 0],
        [0.5, 0, 0.5],
        [0, 0.5, 0.5],
    ]


def test_budget_below_the_floor_is_refused() -> None:
    """A floor of 3 nats raises all KLs by 3 nats."""
    free = Calibration(BETAS, [[0.1, 0.4, 1.5, 5.0, 14.0]], 64, None)
    cut = Calibration(BETAS, [[3.1, 3.4, 4.5, 8.0, 17.0]], 64, 40, floor=3.0)
    one = torch.tensor([1.0])
    for target in (0.05, 0.1, 1.0, 1.5, 7.0, 14.0):
        assert cut.beta(one, target + 3.0) == pytest.approx(free.beta(one, target))
    assert cut.default_beta(one) == pytest.approx(free.default_beta(one))
    for target in (0.5, 3.0):
        with pytest.raises(
            CriticError, match=f"target_kl is {target:g}, but truncating the policy to top_k=40 candidates"
        ):
            cut.beta(one, target)
    with pytest.raises(CriticError, match="calibrated up to 8, which reaches 17 nats"):
        cut.beta(one, 30.0)


# Other lengths

LENGTHS = Calibration(
    betas=[1.0, 2.0],
    kl=[[1.0, 4.0]],
    max_new_tokens=64,
    top_k=7,
    floor=0.2,
    lengths=[32, 64, 256],
    kl_at_lengths=[[[0.6, 2.4]], [[1.0, 4.0]], [[1.6, 7.0]]],
    floor_at_lengths=[0.1, 0.2, 0.5],
)


def test_at_a_measured_length_the_calibration_is_what_was_measured() -> None:
    for length, kl, floor in zip(LENGTHS.lengths, LENGTHS.kl_at_lengths, LENGTHS.floor_at_lengths, strict=True):
        there = LENGTHS.at_length(length)
        assert (there.kl, there.floor, there.max_new_tokens) == (kl, floor, length)
    assert LENGTHS.at_length(64) is LENGTHS


@pytest.mark.parametrize(
    ("length", "kl", "floor"),
    [
        (16, [0.3, 1.2], 0.05),  # from 0 at no tokens
        (48, [0.8, 3.2], 0.15),
        (160, [1.3, 5.5], 0.35),
        (448, [2.2, 10.0], 0.8),  # on at the rate of the last stretch
    ],
)
def test_between_and_beyond_measured_lengths_kl_is_linear_in_the_length(
    length: int, kl: list[float], floor: float
) -> None:
    there = LENGTHS.at_length(length)
    assert there.kl == [pytest.approx(kl)]
    assert there.floor == pytest.approx(floor)


def test_a_calibration_of_one_length_takes_kl_to_be_proportional_to_it() -> None:
    one = Calibration([1.0, 2.0], [[1.0, 4.0]], 64, None)
    assert one.at_length(128).kl == [[2.0, 8.0]]


def test_the_same_budget_takes_a_weaker_tilt_over_a_longer_response() -> None:
    weights = torch.tensor([1.0])
    betas = [LENGTHS.at_length(length).beta(weights, 2.0) for length in (32, 64, 128, 256)]
    assert betas == sorted(betas, reverse=True)
    assert len(set(betas)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": [32, 64]},
        {"lengths": [64, 32, 256]},
        {"floor_at_lengths": [0.1]},
        {"kl_at_lengths": [[[0.6, 2.4]], [[1.0, 4.0]], [[1.6]]]},
    ],
)
def test_lengths_that_do_not_match_their_kl_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CriticError, match="lengths is .*; expected ascending lengths, each with a KL"):
        dataclasses.replace(LENGTHS, **wrong)


def test_responses_too_short_to_spend_a_budget_get_the_largest_strength() -> None:
    calibration = Calibration([1.0, 2.0], [[1.0, 4.0]], 16, None)
    weights = torch.tensor([1.0])
    assert calibration.beta_at_length(weights, 4.0, 16) == pytest.approx(2.0)
    assert calibration.beta_at_length(weights, 2.0, 8) == pytest.approx(2.0)
    with pytest.warns(UserWarning, match="target_kl is 3, but 8 tokens are too few to spend it .* beta 2, is used"):
        assert calibration.beta_at_length(weights, 3.0, 8) == 2.0
    with pytest.raises(CriticError, match="target_kl is 5"):  # which 16 tokens could not spend either
        calibration.beta_at_length(weights, 5.0, 8)
