"""Weights from choices: how wrong they are, and whether their intervals are calibrated."""

from __future__ import annotations

from lib.results import read

from pages.layout import page as layout
from pages.layout import table

STRATEGIES = {"random": "random", "chosen": "by information gain"}


def page() -> str:
    """Write the page from `results/preferences.json`."""
    content = read("preferences")
    rows = {(row["objectives"], row["how"], row["pairs"]): row for row in content["rows"]}
    most = max(pairs for *_, pairs in rows)
    shown = sorted({1, most // 2, most})
    cells = [
        [
            str(objectives),
            STRATEGIES[how],
            *(
                f"{rows[objectives, how, n]['angle']:.0f}° ± {rows[objectives, how, n]['angle_stderr']:.1f}"
                for n in shown
            ),
            f"{rows[objectives, how, most]['coverage']:.3f}",
        ]
        for objectives, how in dict.fromkeys(key[:2] for key in rows)
    ]
    return layout(
        "Preference weights from choices",
        "How many choices between two responses does it take to [infer a user's weights](../guides/preferences.md)?",
        [
            f"The angle between inferred and true weights of {content['config']['users']} simulated users, mean and "
            "standard error, after they chose from a number of pairs. Pairs are picked at random or by expected "
            "information gain. Coverage is how often the 95 % intervals contain the true weight.",
            table(["objectives", "pairs", *(f"after {n}" for n in shown), f"coverage after {most}"], cells),
        ],
        ("preferences", content),
    )
