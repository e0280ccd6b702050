"""Objectives whose rewards depend on the batch, or on nothing that can be repeated."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest

from mavis.errors import ObjectiveError
from mavis.rewards import Brevity, Dialogue, Positive, Readability, check_batch_independence, exclamations, score

RESPONSES = [" ".join(["word"] * n) + "!" * (n % 3) for n in range(1, 41)]

Batch = Callable[[Sequence[str], Sequence[str]], Any]


def check(objective: Batch, size: int = 40) -> None:
    texts = RESPONSES[:size]
    check_batch_independence({"x": objective}, texts, texts, score({"x": objective}, texts, texts))


def lengths(responses: Sequence[str]) -> np.ndarray:
    return np.array([len(response) for response in responses], dtype=np.float64)


DEPENDENT: dict[str, Batch] = {
    "normalised": lambda p, r: (lengths(r) - lengths(r).mean()) / (lengths(r).std() + 1),
    "relative to the longest": lambda p, r: lengths(r) / lengths(r).max(),
    "rank": lambda p, r: lengths(r).argsort().argsort() / len(r),
    "position": lambda p, r: [float(i) for i in range(len(r))],
    "size": lambda p, r: [float(len(r))] * len(r),
    "softmax": lambda p, r: np.exp(lengths(r) - lengths(r).max()) / np.exp(lengths(r) - lengths(r).max()).sum(),
    "the neighbour": lambda p, r: np.roll(lengths(r), 1),
    "sorted": lambda p, r: sorted(lengths(r)),
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("size", [2, 3, 4, 9, 40])
def test_a_reward_that_depends_on_the_batch_is_refused(name: str, size: int) -> None:
    with pytest.raises(ObjectiveError, match=r"objective 'x' scores response \d+ as .* depends on what else is scored"):
        check(DEPENDENT[name], size)


@pytest.mark.parametrize("objective", [Brevity(), Dialogue(), Positive(), Readability(), exclamations])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 40])
def test_what_ships_is_accepted(objective: Any, size: int) -> None:
    check(objective, size)


def test_rounding_is_accepted_up_to_a_tolerance_that_an_objective_may_declare() -> None:
    class Half:
        def __init__(self, error: float) -> None:
            self.error = error

        def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Any:
            return lengths(responses) * (1 + self.error / len(responses))

    check(Half(1e-4))
    coarse = Half(1e-1)
    with pytest.raises(ObjectiveError, match="depends on what else"):
        check(coarse)
    coarse.batch_tolerance = 0.05  # type: ignore[attr-defined]
    check(coarse)


def test_a_random_objective_and_one_with_a_state_are_warned_of() -> None:
    generator, calls = random.Random(0), count()
    with pytest.warns(UserWarning, match="objective 'x' .* it is random or keeps a state"):
        check(lambda p, r: [generator.random() for _ in r])
    with pytest.warns(UserWarning, match="it is random or keeps a state"):
        check(lambda p, r: [float(next(calls))] * len(r))


def test_few_responses_are_scored_again() -> None:
    calls: list[int] = []

    def counts(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(len(responses))
        return [float(len(response)) for response in responses]

    check(counts)
    assert calls == [40, 8, 4, 4]
