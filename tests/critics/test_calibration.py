"""From a KL budget to β."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis.critics import Calibration
from mavis.critics.calibration import DEFAULT_KL, calibration_directions
from mavis.errors import CriticError

BETAS = [0.5, 1.0, 2.0, 4.0, 8.0]


def quadratic(spread: torch.Tensor) -> Calibration:
    """The sweep of a critic whose KL is exactly ½ λᵀ Σ λ."""
    rows = [[float(0.5 * b**2 * d @ spread @ d) for b in BETAS] for d in calibration_directions(len(spread))]
    return Calibration(BETAS, rows, max_new_tokens=64, top_k=None)


@given(
    st.integers(1, 4),
    st.integers(0, 1000),
    st.floats(0.05, 0.95),
)
def test_where_kl_is_quadratic_every_weight_gets_its_exact_beta(objectives: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(objectives, objectives, generator=generator, dtype=torch.float64)
    calibration = quadratic(root @ root.T + torch.eye(objectives, dtype=torch.float64))
    target = share * calibration.range()[1]
    weights = torch.randn(objectives, generator=generator, dtype=torch.float64)
    beta = calibration.beta(weights, target)
    spread = root @ root.T + torch.eye(objectives, dtype=torch.float64)
    assert 0.5 * beta**2 * float(weights @ spread @ weights) == pytest.approx(target, rel=1e-6)


def test_measured_points_are_met_and_between_them_it_interpolates_along_a_power_law() -> None:
    calibration = Calibration(BETAS, [[0.1, 0.4, 1.5, 5.0, 14.0]], 64, 40)
    one = torch.tensor([1.0])
    assert calibration.beta(one, 1.5) == pytest.approx(2.0)
    assert calibration.beta(one, 5.0) == pytest.approx(4.0)
    assert calibration.beta(one, (1.5 * 5.0) ** 0.5) == pytest.approx(8.0**0.5)
    assert calibration.beta(2 * one, 1.5) == pytest.approx(1.0)  # only β·w counts
    assert calibration.beta(one, 0.025) == pytest.approx(0.25)  # below the sweep KL is quadratic


def test_noise_that_makes_kl_fall_does_not_make_beta_jump_back() -> None:
    calibration = Calibration(BETAS, [[0.1, 0.5, 0.45, 2.0, 1.9]], 64, 40)
    assert calibration.range() == (0.1, 2.0)
    betas = [calibration.beta(torch.tensor([1.0]), target) for target in (0.2, 0.5, 1.0, 2.0)]
    assert betas == sorted(betas)


@pytest.mark.parametrize("target", [14.5, float("nan"), -1.0])
def test_a_budget_beyond_the_sweep_is_refused(target: float) -> None:
    with pytest.raises(CriticError, match="calibrated from 0.1 to 14 nats"):
        Calibration(BETAS, [[0.1, 0.4, 1.5, 5.0, 14.0]], 64, 40).beta(torch.tensor([1.0]), target)


def test_the_default_beta_aims_at_the_default_distance_at_equal_weights() -> None:
    calibration = quadratic(torch.eye(2, dtype=torch.float64))
    beta = calibration.default_beta()
    assert 0.5 * beta**2 * 0.5 == pytest.approx(DEFAULT_KL)
    weak = Calibration(BETAS, [[0.01, 0.02, 0.05, 0.1, 0.2]], 64, 40)
    assert weak.default_beta() == pytest.approx(8.0)
    untrained = Calibration(BETAS, [[0.0] * 5], 64, 40)
    assert untrained.default_beta() == 8.0


def test_directions_are_every_objective_alone_then_every_pair() -> None:
    assert calibration_directions(3).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0.5, 0.5, 0],
        [0.5, 0, 0.5],
        [0, 0.5, 0.5],
    ]
