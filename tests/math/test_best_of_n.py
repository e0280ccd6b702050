"""Best of n against all subsets, one by one."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from mavis.errors import EvaluationError
from mavis.math.best_of_n import best_of_n


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_it_is_the_mean_over_all_subsets(n: int) -> None:
    rewards = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.3, 0.3, -2.0], [1.0, 4.0, 2.0, 3.0, 0.0, -1.0, 7.0]])
    expected_reward = expected_kl = 0.0
    for row in rewards.double():
        best = [max(subset) for subset in combinations(row.tolist(), n)]
        expected_reward += sum(best) / len(best) / 2
        for value in set(row.tolist()):
            share = best.count(value) / len(best)
            among = row.tolist().count(value) / 7
            expected_kl += share * math.log(share / among) / 2 if share else 0.0
    reward, kl = best_of_n(rewards, n)
    assert reward == pytest.approx(expected_reward)
    assert kl == pytest.approx(expected_kl, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_without_ties_the_kl_is_the_known_one(n: int) -> None:
    _, kl = best_of_n(torch.arange(50_000.0)[None], n)
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-3)


def test_one_is_the_reference_and_all_are_the_best() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert best_of_n(rewards, 1) == pytest.approx((3.0, 0.0))
    assert best_of_n(rewards, 3) == pytest.approx((6.0, math.log(3)))


def test_too_many_or_none_are_refused() -> None:
    for n in (0, 4):
        with pytest.raises(EvaluationError, match=f"n is {n}, expected 1 ≤ n ≤ 3"):
            best_of_n(torch.zeros(1, 3), n)
    with pytest.raises(EvaluationError, match="finite, non-empty"):
        best_of_n(torch.tensor([[math.nan]]), 1)
