"""The committed results support what the documentation claims."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise
from statistics import mean
from typing import Any

from tests.benchmarks.conftest import RESULTS, rows_of


def test_no_result_contains_a_local_path() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        text = path.read_text("utf-8")
        assert not any(folder in text for folder in ('"/', "/home/", "/tmp/", "/root/")), path.name


def test_conditioned_iteration_with_exact_values_reaches_the_optimum_and_never_falls() -> None:
    courses = defaultdict(list)
    for row in rows_of("exact"):
        if row["composition"] == "conditioned":
            courses[row["kind"], row["seed"], row["beta"], *row["weights"]].append((row["iteration"], row["share"]))
    assert len(courses) >= 4 * 5 * 3 * 5
    for key, course in courses.items():
        shares = [share for _, share in sorted(course)]
        assert shares[4] >= 0.999 or key[2] > 5, key
        assert all(after >= before - 1e-6 for before, after in pairwise(shares)), key


def test_learnt_conditioned_heads_reach_the_optimum_where_exact_independent_values_do_not() -> None:
    ends = defaultdict(list)
    for row in rows_of("exact-learnt"):
        if row["weights"] == [0.5, 0.5] and row["iteration"] == 6 and row["beta"] == 5.0:
            ends[row["composition"], row["critic"]].append(row["share"])
    assert len(ends["conditioned", "hidden_state"]) == 3
    assert min(ends["conditioned", "hidden_state"]) >= 0.97
    assert ends["independent", "exact"][0] < 0.8


def test_critics_reach_their_targets_of_frontier_efficiency() -> None:
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


def test_no_iteration_lowers_the_objective() -> None:
    """Mean over seeds, up to three standard errors."""
    courses: Any = defaultdict(lambda: defaultdict(list))
    for row in rows_of("iterations"):
        courses[row["policy"], row["method"], *row["weights"]][row["iterations"]].append((row["j"], row["error"]))
    assert len(courses) >= 2 * 3 * 3
    for key, course in courses.items():
        goals = [mean(j for j, _ in found) for _, found in sorted(course.items())]
        errors = [math.sqrt(sum(e**2 for _, e in found)) / len(found) for _, found in sorted(course.items())]
        for (before, after), (one, other) in zip(pairwise(goals), pairwise(errors), strict=True):
            assert after >= before - 3 * math.hypot(one, other), key
