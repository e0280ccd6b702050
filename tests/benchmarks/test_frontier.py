"""The statistics of the frontier benchmark."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture
def bench_frontier(benchmarks_on_path: None) -> Any:
    return importlib.import_module("bench_frontier")


def test_the_equivalent_n_is_interpolated_between_measured_n(bench_frontier: Any) -> None:
    rewards = {1: 0.0, 2: 1.0, 8: 2.0}
    expected = {0.0: 1.0, 1.0: 2.0, 1.5: 4.0, 2.0: 8.0}
    for reward, n in expected.items():
        assert bench_frontier.equivalent_n(rewards, reward) == pytest.approx(n)
    assert [bench_frontier.equivalent_n(rewards, reward) for reward in (None, -0.1, 2.1)] == [None, None, None]


def test_a_spread_needs_a_value_from_every_seed(bench_frontier: Any) -> None:
    assert bench_frontier.spread("x", [1.0, 2.0, 3.0]) == {"x": 2.0, "x_std": 1.0}
    assert bench_frontier.spread("x", [1.0]) == {"x": 1.0, "x_std": None}
    assert bench_frontier.spread("x", [1.0, None]) == {"x": None, "x_std": None}


def test_a_method_whose_truncation_costs_too_much_has_empty_rows(bench_frontier: Any) -> None:
    rows = bench_frontier.rows_of("somewhere/policy", "paper", [], 9.3, None)
    assert len(rows) == len(bench_frontier.WEIGHTS) * len(bench_frontier.TARGETS)
    for row in rows:
        assert (row["policy"], row["truncation_kl"], row["seeds"]) == ("policy", 9.3, 0)
        assert {row[name] for name in ("efficiency", "equivalent_n", "train_seconds", "decode_ratio")} == {None}


def test_the_stand_in_replaces_a_method_whose_truncation_costs_too_much(bench_frontier: Any) -> None:
    methods = ["best", "paper", "trunk"]
    assert bench_frontier.trained_methods("policy", methods, {("policy", "paper"): 0.3}) == ["best", "paper"]
    assert bench_frontier.trained_methods("policy", methods, {("policy", "paper"): 9.3}) == ["best", "trunk"]
    with pytest.raises(SystemExit, match="no method of paper can be trained"):
        bench_frontier.trained_methods("policy", ["paper"], {("policy", "paper"): 9.3})


def test_seeds_are_aggregated_by_weights(bench_frontier: Any) -> None:
    cells = [
        {
            "seconds": seconds,
            "entries": [
                {"weights": [1.0, 0.0], "kl": 2.0, "efficiency": efficiency, "equivalent_n": 4.0},
                {"weights": [0.0, 1.0], "kl": 2.0, "efficiency": None, "equivalent_n": None},
            ],
        }
        for seconds, efficiency in ((100.0, 0.7), (300.0, 0.8), (110.0, 0.9))
    ]
    one, other = bench_frontier.rows_of("policy", "memory", cells, 0.0, 0.5)
    assert (one["efficiency"], one["efficiency_std"], one["equivalent_n"]) == (0.8, 0.1, 4.0)
    assert (one["train_seconds"], one["decode_ratio"], one["weights"]) == (110, 0.5, [1.0, 0.0])
    assert (other["efficiency"], other["weights"]) == (None, [0.0, 1.0])
