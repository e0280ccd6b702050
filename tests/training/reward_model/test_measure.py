"""Metrics of a reward model, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from mavis.training.reward_model.measure import accuracy_error, clustered_error, length_fit, measure, reliability


def test_the_error_of_independent_pairs_is_binomial() -> None:
    right = tensor([1.0] * 30 + [0.0] * 10).double()
    assert clustered_error(right, range(40)) == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    share = 31 / 42
    assert accuracy_error(right, range(40)) == pytest.approx(math.sqrt(share * (1 - share) / 40))


def test_pairs_of_one_prompt_that_agree_count_as_one() -> None:
    right = tensor([1.0] * 30 + [0.0] * 10).double()
    groups = [index // 10 for index in range(40)]  # four prompts: three right, one wrong
    assert accuracy_error(right, groups) == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_ten_of_ten_has_an_error() -> None:
    assert accuracy_error(torch.ones(10).double(), range(10)) == pytest.approx(math.sqrt(11 / 12 * 1 / 12 / 10))


def test_length_is_fitted_within_pairs() -> None:
    correlation, slope = length_fit(tensor([2.0, -1.0, 0.0]).double(), tensor([100.0, -50.0, 0.0]).double())
    assert (correlation, slope) == (pytest.approx(1), pytest.approx(2))
    correlation, slope = length_fit(tensor([1.0, 1.0]).double(), tensor([100.0, -100.0]).double())
    assert (correlation, slope) == (0, 0)
    swapped = length_fit(tensor([-2.0, -1.0]).double(), tensor([-100.0, -30.0]).double())
    assert swapped == length_fit(tensor([2.0, -1.0]).double(), tensor([100.0, -30.0]).double())
    assert length_fit(tensor([1.0]).double(), tensor([0.0]).double()) == (None, None)
    assert length_fit(tensor([0.0]).double(), tensor([5.0]).double()) == (None, 0)


def test_reliability_compares_what_is_stated_with_what_is_observed() -> None:
    sure = math.log(9)  # σ = 0.9, the lower edge of the last bin in exact arithmetic
    rows, distance = reliability(tensor([sure + 0.01] * 4 + [-sure - 0.01] + [0.0] * 5).double())
    assert [row["pairs"] for row in rows] == [5, 5]
    assert [row["stated"] for row in rows] == pytest.approx([0.5, 0.9], abs=2e-3)
    assert [row["observed"] for row in rows] == pytest.approx([0.5, 0.8])
    assert distance == pytest.approx(0.05, abs=1e-3)


def test_a_model_is_compared_with_lengths_pair_by_pair() -> None:
    scores, characters = tensor([1.0, 2.0, -1.0, 3.0]).double(), tensor([10.0, -5.0, -5.0, 0.0]).double()
    found = measure(scores, characters, [0, 1, 2, 3], "shorter")
    assert found["accuracy"] == 0.75
    assert found["longer_accuracy"] == 0.375
    assert found["baseline_accuracy"] == 0.625
    assert found["gain"] == 0.125  # 1, 0, −1, ½
    assert found["gain_error"] == pytest.approx(math.sqrt(0.875**2 + 0.125**2 + 1.125**2 + 0.375**2) / 4)
    assert found["log_loss"] == pytest.approx(sum(math.log(1 + math.exp(-score)) for score in (1, 2, -1, 3)) / 4)
