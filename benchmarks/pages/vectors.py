"""Alignment vectors: reward by coefficient, compared and combined with a tilt, and on a model trained further."""

from __future__ import annotations

from typing import Any

import numpy as np
from lib.formatting import DASH, mean_and_range
from lib.results import read

from pages.layout import page as layout
from pages.layout import table

KLS = (0.5, 1.0, 2.0, 3.0, 4.0)


def page() -> str:
    """Write the page from `results/vectors.json`."""
    content = read("vectors")
    rows = content["rows"]
    difference = max(row["max_difference"] / row["largest"] for row in rows if row["what"] == "exactness")
    copies = {row["vector"]: row["copies"] for row in rows if row["what"] == "memory"}
    names = list(dict.fromkeys(row["vector"] for row in rows if row["what"] == "exactness"))
    later = {name: [r["share"] for r in rows if r["what"] == "later stage" and r["vector"] == name] for name in names}
    shares = [f"{mean_and_range(values)} for `{name}`" for name, values in later.items()]
    return layout(
        "Alignment vectors",
        "What do [alignment vectors](../guides/vectors.md) do, alone and together with a tilt?",
        [
            "Rewards are in standard deviations of the embedded policy, KL is measured to it, and all entries are mean "
            f"and range of {len(content['config']['seeds'])} seeds. With coefficient 1 the logits match those of the "
            f"aligned model to {difference:.0e} of the largest logit.",
            "![Reward against coefficient, and methods of steering at the same KL](vectors.svg)",
            "## Reward by coefficient\n\nReward of each vector's own objective.",
            _by_coefficient(rows, names),
            "## Vectors and tilts at the same KL\n\nReward at equal weights: with both vectors at equal coefficients, "
            "with a tilt, and with a tilt on policies into which both vectors have been merged.",
            _by_method(rows),
            "## On a model trained further\n\nApplied to a policy that was trained further (for `readability`), a "
            f"vector has this share of its original gain: {', '.join(shares)}.",
            "## Memory\n\nApplying a vector to a policy of 100 million parameters takes "
            f"{copies['memory']:.2f} times the policy's weights in total if the vector is in memory, and "
            f"{copies['folder']:.2f} times if it is read from a folder.",
        ],
        ("vectors", content),
    )


def _by_coefficient(rows: list[dict[str, Any]], names: list[str]) -> str:
    groups: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["what"] == "level":
            [(name, level)] = row["coefficients"].items()
            groups.setdefault((name, level), []).append(row["rewards"][name])
    levels = sorted({level for _, level in groups})
    cells = [[name, *(mean_and_range(groups[name, level]) for level in levels)] for name in names]
    return table(["vector", *(f"{level:g}" for level in levels)], cells)


def _by_method(rows: list[dict[str, Any]]) -> str:
    sweeps: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["what"] == "sweep":
            start = [] if "merged" in row["way"] else [(0.0, 0.0)]
            sweeps.setdefault(row["way"], {}).setdefault(row["seed"], start).append((row["kl"], row["reward"]))
    cells = []
    for method, points in sweeps.items():
        rewards = [[_reward_at(sorted(line), kl) for line in points.values()] for kl in KLS]
        cells.append([method, *(DASH if None in values else mean_and_range(values) for values in rewards)])
    return table(["method", *(f"KL {kl:g}" for kl in KLS)], cells)


def _reward_at(points: list[tuple[float, float]], kl: float) -> float | None:
    """Interpolate a sweep (KL, reward); None outside its range."""
    if not points[0][0] <= kl <= points[-1][0]:
        return None
    kls, rewards = np.array(points).T
    return float(np.interp(kl, kls, rewards))
