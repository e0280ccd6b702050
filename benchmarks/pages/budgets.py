"""KL budgets: what a budget really spends at several response lengths."""

from __future__ import annotations

from lib.formatting import weights
from lib.results import read

from pages.layout import page as layout
from pages.layout import table


def page() -> str:
    """Write the page from `results/budgets.json`."""
    content = read("budgets")
    rows = {(tuple(row["weights"]), row["target_kl"], row["length"]): row for row in content["rows"]}
    lengths = sorted({length for *_, length in rows})
    cells = [
        [
            weights(choice),
            f"{budget:g}",
            *(f"{row['kl']:.2f} ± {row['error']:.2f}" for row in (rows[choice, budget, n] for n in lengths)),
        ]
        for choice, budget in dict.fromkeys(key[:2] for key in rows)
    ]
    config = content["config"]
    responses = config["samples"] * config["prompts"]
    return layout(
        "KL budgets at several lengths",
        "Does `target_kl` spend what it says, whatever the [length of the response](../concepts/budgets.md)?",
        [
            f"Nats spent per response by the embedded policy and critic, mean and standard error of {responses} "
            f"responses to {config['prompts']} openings that were neither trained nor calibrated on. The critic was "
            f"trained with responses of {config['trained_length']} tokens.",
            table(["weights", "budget", *(f"{n} tokens" for n in lengths)], cells),
        ],
        ("budgets", content),
    )
