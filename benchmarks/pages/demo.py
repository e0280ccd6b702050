"""The demo: how close it comes to the optimum, and how long it takes."""

from __future__ import annotations

import json

from lib.formatting import machine, mean_and_range
from lib.results import read

from pages.layout import page as layout
from pages.layout import table


def page() -> str:
    """Write the page from `results/demo.json`."""
    content = read("demo")
    groups: dict[tuple[str, float], list[float]] = {}
    for row in content["rows"]:
        groups.setdefault((json.dumps(row["weights"]), row["kl"]), []).append(row["efficiency"])
    choices = list(dict.fromkeys(name for name, _ in groups))
    kls = list(dict.fromkeys(kl for _, kl in groups))
    rows = [
        [
            ", ".join(f"{name} {weight:g}" for name, weight in json.loads(choice).items()),
            *(mean_and_range(groups[choice, kl]) for kl in kls),
        ]
        for choice in choices
    ]
    seconds = sorted({row["seed"]: row["seconds"] for row in content["rows"]}.values())
    return layout(
        "The demo",
        "How close does `make demo` come to the optimum, and how long does it take?",
        [
            f"One run took {seconds[0]:.0f} to {seconds[-1]:.0f} seconds on {machine(content)}. The table shows "
            "[frontier efficiency](../concepts/frontier.md) on held-out prompts, as mean and range of "
            f"{len(seconds)} seeds.",
            table(["weights", *(f"KL {kl:g}" for kl in kls)], rows),
        ],
        ("demo", content),
    )
