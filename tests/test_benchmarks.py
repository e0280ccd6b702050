"""The committed results are what they are said to be, and the benchmarks' own statistics are right."""

from __future__ import annotations

import importlib
import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def rows_of(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text("utf-8"))["rows"]
    return rows


@pytest.fixture
def bench_frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_frontier")


# What is claimed


def test_no_result_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        text = path.read_text("utf-8")
        assert not any(folder in text for folder in ('"/', "/home/", "/tmp/", "/root/")), path.name


def test_exact_conditioned_iteration_reaches_the_optimum_and_never_falls() -> None:
    courses = defaultdict(list)
    for row in rows_of("exact"):
        if row["composition"] == "conditioned":
            courses[row["kind"], row["seed"], row["beta"], *row["weights"]].append((row["iteration"], row["share"]))
    assert len(courses) >= 4 * 5 * 3 * 5
    for key, course in courses.items():
        shares = [share for _, share in sorted(course)]
        assert shares[4] >= 0.999 or key[2] > 5, key
        assert all(after >= before - 1e-6 for before, after in pairwise(shares)), key


def test_learnt_heads_come_to_the_optimum_where_exact_values_of_single_objectives_do_not() -> None:
    ends = defaultdict(list)
    for row in rows_of("exact-learnt"):
        if row["weights"] == [0.5, 0.5] and row["iteration"] == 6 and row["beta"] == 5.0:
            ends[row["composition"], row["critic"]].append(row["share"])
    assert len(ends["conditioned", "hidden_state"]) == 3
    assert min(ends["conditioned", "hidden_state"]) >= 0.97
    assert ends["independent", "exact"][0] < 0.8


def test_the_frontier_is_reached_as_far_as_was_asked() -> None:
    found = {(r["policy"], r["method"], *r["weights"], r["kl"]): r["efficiency"] for r in rows_of("frontier")}
    policies = {key[0] for key in found}
    assert len(policies) == 2
    weights = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    for policy in policies:
        for method, least in (("best", 0.85), ("memory", 0.80), ("hidden", 0.70)):
            assert mean(found[policy, method, *w, 2.0] for w in weights) >= least, (policy, method)
    papers = [(key, value) for key, value in found.items() if key[1] == "paper" and value is not None]
    assert len(papers) >= len(weights) * 3
    for (policy, _, *cell), value in papers:
        assert found[policy, "best", *cell] > value, (policy, cell)


def test_no_round_takes_away_what_those_before_it_have_won() -> None:
    """Mean over seeds, but for three sampling errors."""
    courses: Any = defaultdict(lambda: defaultdict(list))
    for row in rows_of("rounds"):
        courses[row["policy"], row["method"], *row["weights"]][row["rounds"]].append((row["j"], row["error"]))
    assert len(courses) >= 2 * 3 * 3
    for key, course in courses.items():
        goals = [mean(j for j, _ in found) for _, found in sorted(course.items())]
        errors = [math.sqrt(sum(e**2 for _, e in found)) / len(found) for _, found in sorted(course.items())]
        for (before, after), (one, other) in zip(pairwise(goals), pairwise(errors), strict=True):
            assert after >= before - 3 * math.hypot(one, other), key


# How they are made


def test_what_earns_as_much_as_one_response_is_told_between_the_n_that_were_measured(bench_frontier: Any) -> None:
    rewards = {1: 0.0, 2: 1.0, 8: 2.0}
    asked = {0.0: 1.0, 1.0: 2.0, 1.5: 4.0, 2.0: 8.0}
    for reward, n in asked.items():
        assert bench_frontier.as_best_of(rewards, reward) == pytest.approx(n)
    assert [bench_frontier.as_best_of(rewards, reward) for reward in (None, -0.1, 2.1)] == [None, None, None]


def test_a_spread_needs_a_figure_from_every_seed(bench_frontier: Any) -> None:
    assert bench_frontier.spread("x", [1.0, 2.0, 3.0]) == {"x": 2.0, "x_std": 1.0}
    assert bench_frontier.spread("x", [1.0]) == {"x": 1.0, "x_std": None}
    assert bench_frontier.spread("x", [1.0, None]) == {"x": None, "x_std": None}


def test_a_method_whose_cut_costs_more_than_is_asked_has_rows_without_figures(bench_frontier: Any) -> None:
    rows = bench_frontier.rows_of("somewhere/policy", "paper", [], 9.3, None)
    assert len(rows) == len(bench_frontier.WEIGHTS) * len(bench_frontier.TARGETS)
    for row in rows:
        assert (row["policy"], row["cut_kl"], row["seeds"]) == ("policy", 9.3, 0)
        assert {row[name] for name in ("efficiency", "as_best_of", "train_seconds", "decode_ratio")} == {None}


def test_the_uncut_trunk_takes_the_place_of_what_a_cut_makes_hopeless(bench_frontier: Any) -> None:
    asked = ["best", "paper", "trunk"]
    assert bench_frontier.compared("policy", asked, {("policy", "paper"): 0.3}) == ["best", "paper"]
    assert bench_frontier.compared("policy", asked, {("policy", "paper"): 9.3}) == ["best", "trunk"]
    with pytest.raises(SystemExit, match="nothing that could be compared"):
        bench_frontier.compared("policy", ["paper"], {("policy", "paper"): 9.3})


def test_seeds_are_gathered_weight_by_weight(bench_frontier: Any) -> None:
    cells = [
        {
            "seconds": seconds,
            "entries": [
                {"weights": [1.0, 0.0], "kl": 2.0, "efficiency": efficiency, "as_best_of": 4.0},
                {"weights": [0.0, 1.0], "kl": 2.0, "efficiency": None, "as_best_of": None},
            ],
        }
        for seconds, efficiency in ((100.0, 0.7), (300.0, 0.8), (110.0, 0.9))
    ]
    one, other = bench_frontier.rows_of("policy", "memory", cells, 0.0, 0.5)
    assert (one["efficiency"], one["efficiency_std"], one["as_best_of"]) == (0.8, 0.1, 4.0)
    assert (one["train_seconds"], one["decode_ratio"], one["weights"]) == (110, 0.5, [1.0, 0.0])
    assert (other["efficiency"], other["weights"]) == (None, [0.0, 1.0])
