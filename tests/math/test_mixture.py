"""The coefficients that make a tilt of values and of the KL still to come."""

from __future__ import annotations

import torch

from mavis.math.mixture import kl_unit, tilt_coefficients


def test_by_hand() -> None:
    lam = torch.tensor([[3.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(kl_unit(lam), torch.tensor([[16 / 5], [0.0], [1 / 2]]))
    expected = torch.tensor([[3.0, 1.0, -16 / 5], [0.0, 0.0, 0.0], [-1.0, 0.0, -1 / 2]])
    torch.testing.assert_close(tilt_coefficients(lam), expected)


def test_the_unit_of_kl_is_quadratic_at_small_strengths_and_linear_at_large_ones() -> None:
    direction = torch.tensor([0.25, 0.75], dtype=torch.float64)
    torch.testing.assert_close(kl_unit(1e-6 * direction)[0] / 1e-12, torch.tensor(1.0).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(kl_unit(1e6 * direction)[0] / 1e6, torch.tensor(1.0).double(), atol=1e-5, rtol=0)
