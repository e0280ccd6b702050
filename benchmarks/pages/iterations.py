"""The course of training: J after every iteration."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import mean
from typing import Any

from lib.formatting import weights
from lib.results import read

from pages.layout import page as layout
from pages.layout import table


def page() -> str:
    """Write the page from `results/iterations.json`."""
    content = read("iterations")
    groups: dict[tuple[str, str], dict[str, dict[int, list[dict[str, Any]]]]] = {}
    for row in content["rows"]:
        by_iteration = groups.setdefault((row["policy"], row["method"]), {}).setdefault(weights(row["weights"]), {})
        by_iteration.setdefault(row["iterations"], []).append(row)
    choices = list(dict.fromkeys(choice for group in groups.values() for choice in group))
    courses = {
        (*key, choice): [(mean(row["j"] for row in rows), _standard_error(rows)) for rows in group[choice].values()]
        for key, group in groups.items()
        for choice in choices
    }
    rows = [
        [*key, *(" → ".join(f"{j:.2f} ± {error:.2f}" for j, error in courses[*key, choice]) for choice in choices)]
        for key in groups
    ]
    falls = [
        f"`{method}` on {policy} at {choice} in iteration {iteration}, by {before[0] - after[0]:.2f}"
        for (policy, method, choice), course in courses.items()
        for iteration, (before, after) in enumerate(pairwise(course), start=1)
        if before[0] - after[0] > 2 * math.hypot(before[1], after[1])
    ]
    beta, seeds = content["config"]["beta"], len(content["config"]["seeds"])
    return layout(
        "Training by iteration",
        "Does every iteration of training improve the policy?",
        [
            f"J_w = reward − KL/β at β = {beta:g} on held-out prompts: of the reference policy (truncated to the "
            f"method's candidates), then after each iteration. Each entry is the mean of {seeds} seeds with its "
            "standard error, for the weights of (`positive`, `dialogue`). The critics are those of the "
            "[frontier benchmark](frontier.md).",
            table(["policy", "critic", *choices], rows),
            f"Decreases of more than two standard errors: {'; '.join(falls) or 'none'}.",
        ],
        ("iterations", content),
    )


def _standard_error(rows: list[dict[str, Any]]) -> float:
    """Combine the standard errors of the seeds into that of their mean."""
    return math.sqrt(sum(row["error"] ** 2 for row in rows)) / len(rows)
