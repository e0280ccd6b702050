"""Exactly solvable worlds: the share of the possible gain that each composition reaches."""

from __future__ import annotations

from lib.formatting import mean_and_range, weights
from lib.results import read

from pages.layout import page as layout
from pages.layout import table

CHOICES = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
CRITICS = {"exact": "exact values", "hidden_state": "learnt heads"}


def page() -> str:
    """Write the page from `results/exact.json` and `results/exact-learnt.json`."""
    exact, learnt = read("exact"), read("exact-learnt")
    config = learnt["config"]
    beta, last = config["beta"], config["iterations"]
    iterations = sorted({0, 1, 2, max(row["iteration"] for row in exact["rows"])})
    groups: dict[tuple[str, str, int], list[float]] = {}
    for row in exact["rows"]:
        if row["beta"] == beta and max(row["weights"]) < 1:
            groups.setdefault((row["kind"], row["composition"], row["iteration"]), []).append(row["share"])
    exact_rows = [
        [kind, composition, *(mean_and_range(groups[kind, composition, iteration], 3) for iteration in iterations)]
        for kind, composition in dict.fromkeys(key[:2] for key in groups)
    ]
    final: dict[tuple[str, str, tuple[float, ...]], list[float]] = {}
    for row in learnt["rows"]:
        if row["iteration"] == last:
            final.setdefault((row["composition"], row["critic"], tuple(row["weights"])), []).append(row["share"])
    learnt_rows = [
        [composition, CRITICS[critic], *(mean_and_range(final[composition, critic, choice], 3) for choice in CHOICES)]
        for composition, critic in dict.fromkeys(key[:2] for key in final)
    ]
    worlds = len({row["seed"] for row in exact["rows"]})
    return layout(
        "Exactly solvable worlds",
        "How much of the optimum does each [composition](../concepts/compositions.md) reach where it is known?",
        [
            "Small worlds are solved by dynamic programming. The tables show the share of the possible gain J* − J_ref "
            f"that is reached at β = {beta:g}; 1 is the optimum.",
            f"## Exact values\n\nMean and range over {worlds} worlds of each kind of reward and a grid of mixed "
            "weights, by iteration. Iteration 0 uses the values of the reference policy. For a single objective the "
            "two compositions are the same.",
            table(["rewards", "composition", *(f"iteration {iteration}" for iteration in iterations)], exact_rows),
            f"## Learnt values\n\nHeads trained from {config['rollouts']:,} sampled responses per iteration, in one "
            f"{config['kind']} world after iteration {last}, by weights: mean and range of {len(config['seeds'])} "
            "seeds.",
            table(["composition", "values", *map(weights, CHOICES)], learnt_rows),
        ],
        ("exact", exact),
        ("exact-learnt", learnt),
    )
