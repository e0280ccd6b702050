"""vLLM: what a tilt costs inside the engine."""

from __future__ import annotations

from typing import Any

from lib.formatting import DASH, machine
from lib.results import read

from pages.layout import NAMES, table
from pages.layout import page as layout

COMPARISONS = {
    "tilted": "all requests tilted, compared with none tilted in the same engine",
    "none asks": "no request tilted, compared with an engine without the processor",
}


def page() -> str:
    """Write the page from `results/vllm.json`."""
    content = read("vllm")
    ratios = {(row["policy"], row["what"], row["concurrency"]): f"{row['ratio']:.3f}" for row in content["rows"]}
    concurrencies = sorted({concurrency for *_, concurrency in ratios})
    rows = [
        [
            NAMES.get(policy, policy),
            COMPARISONS[what],
            *(ratios.get((policy, what, concurrency), DASH) for concurrency in concurrencies),
        ]
        for policy, what in dict.fromkeys(key[:-1] for key in ratios)
    ]
    config = content["config"]
    return layout(
        "vLLM",
        "What does a tilt cost inside vLLM?",
        [
            f"The ratio of throughputs on {machine(content)}, for {config['new_tokens']} new tokens after a prompt of "
            f"{config['context']}, with a hidden-state critic of the independent composition. The two measurements "
            "alternate, and the ratio is a median over repeats.",
            table(["policy", "comparison", *(f"{n} request{'s' * (n > 1)}" for n in concurrencies)], rows),
            f"Without a tilt, one token for one request takes {_milliseconds(content)}. The cost of a tilt weighs most "
            "where that is short.",
        ],
        ("vllm", content),
    )


def _milliseconds(content: dict[str, Any]) -> str:
    """Format the time per token of a single plain request, by policy."""
    rows = [row for row in content["rows"] if row["what"] == "none asks" and row["concurrency"] == 1]
    return " and ".join(
        f"{1e3 / row['plain_tokens_per_second']:.1f} ms ({NAMES.get(row['policy'], row['policy'])})" for row in rows
    )
