"""Weights by name, undetermined objectives, and the next pair to ask about."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from mavis.errors import PreferenceError
from mavis.preference import InferredWeights, infer_weights, next_pair

GOOD, SHORT = [1.5, 0.2], [0.1, 1.5]


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_consistent_choices_give_a_positive_weight() -> None:
    inferred = infer_weights(table(*[GOOD] * 6), ["good", "short"])
    assert list(inferred.weights) == list(inferred.low) == list(inferred.high) == ["good", "short"]
    assert inferred.low["good"] > 0
    assert inferred.low["short"] < 0 < inferred.high["short"]
    for name, weight in inferred.weights.items():
        assert inferred.low[name] < weight < inferred.high[name]
    assert inferred.covariance.shape == (2, 2)
    assert (inferred.pairs, inferred.undetermined) == (6, ())


def test_an_opposite_choice_lowers_the_weight() -> None:
    agreed = infer_weights(table(*[GOOD] * 4), ["good", "short"])
    mixed = infer_weights(table(*[GOOD] * 4, [-x for x in GOOD]), ["good", "short"])
    opposite = infer_weights(-table(*[GOOD] * 4), ["good", "short"])
    assert mixed.weights["good"] < agreed.weights["good"]
    assert opposite.weights["good"] == pytest.approx(-agreed.weights["good"], rel=0.1)


def test_an_objective_without_differences_is_undetermined_and_stays_wide() -> None:
    inferred = infer_weights(table([1.0, 0.0, 0.5], [2.0, 0.0, -1.0]), ["good", "same", "short"])
    assert inferred.undetermined == ("same",)
    assert inferred.low["same"] < -2 < 2 < inferred.high["same"]
    assert inferred.weights["same"] == 0


def test_normalised_weights_keep_their_signs_and_proportions() -> None:
    inferred = InferredWeights({"a": 3.0, "b": -1.0}, {}, {}, torch.zeros(2, 2), 1, ())
    assert inferred.normalised() == {"a": 0.75, "b": -0.25}
    nothing = InferredWeights({"a": 0.0, "b": 0.0}, {}, {}, torch.zeros(2, 2), 1, ())
    assert nothing.normalised() == {"a": 0.0, "b": 0.0}


def test_inferred_weights_convert_to_json() -> None:
    inferred = infer_weights(table(GOOD, SHORT), ["good", "short"])
    plain = json.loads(json.dumps(inferred.to_json(), allow_nan=False))
    assert plain["weights"] == inferred.weights
    assert (plain["level"], plain["pairs"], plain["undetermined"]) == (0.95, 2, [])
    assert sum(abs(weight) for weight in plain["normalised"].values()) == pytest.approx(1)


def test_one_objective_has_a_weight_too() -> None:
    inferred = infer_weights(table([1.0], [2.0]), ["good"])
    assert inferred.covariance.shape == (1, 1)
    assert inferred.normalised() == {"good": 1.0}


@pytest.mark.parametrize(
    ("differences", "objectives", "message"),
    [
        (torch.zeros(0, 2), ["a", "b"], "differences has no rows"),
        (torch.zeros(3, 2), ["a", "b"], r"none of the 3 pairs differs on any objective \(a, b\)"),
        (table([1.0, 2.0]), ["a"], r"differences has shape \(1, 2\), but objectives is \['a'\]"),
        (table([1.0, 2.0]), ["a", "a"], r"but objectives is \['a', 'a'\]"),
        (table([1.0, 2.0]), "ab", r"but objectives is \['ab'\]"),
        (table([1.0, math.nan]), ["a", "b"], "differences is nan in row 0, column 1"),
        (torch.ones(2), ["a", "b"], r"differences has shape \(2,\)"),
    ],
)
def test_uninformative_differences_are_refused(differences: Tensor, objectives: list[str], message: str) -> None:
    with pytest.raises(PreferenceError, match=f"{message}.* Hint: "):
        infer_weights(differences, objectives)


def test_the_next_pair_differs_on_the_unknown_objective() -> None:
    candidates = table([0.0, 0.0], [1.5, 0.0], [0.0, 1.5])
    assert next_pair(candidates, table(*[[1.5, 0.0]] * 8)) == 2
    assert next_pair(candidates, table(*[[0.0, -1.5]] * 8)) == 1


def test_no_pair_is_asked_about_twice() -> None:
    candidates = table([0.5, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0])
    asked: list[int] = []
    for _ in candidates:
        asked.append(next_pair(candidates, torch.zeros(0, 2), asked))
    assert sorted(asked) == [0, 1, 2, 3]
    with pytest.raises(PreferenceError, match="all 4 candidate pairs have been asked about"):
        next_pair(candidates, torch.zeros(0, 2), asked)
    with pytest.raises(PreferenceError, match="all 0 candidate pairs"):
        next_pair(candidates[:0], torch.zeros(0, 2))


def test_candidates_of_other_objectives_are_refused() -> None:
    with pytest.raises(PreferenceError, match="candidates has 3 columns, but the weights are of 2 objectives"):
        next_pair(torch.ones(2, 3), table(GOOD))
