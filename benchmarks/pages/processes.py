"""Several processes: how sampling scales."""

from __future__ import annotations

from lib.formatting import number
from lib.results import read

from pages.layout import page as layout
from pages.layout import table


def page() -> str:
    """Write the page from `results/processes.json`."""
    content = read("processes")
    config = content["config"]
    rows = [
        [
            str(row["processes"]),
            number(row["rollouts_per_second"], 0),
            number(row["tokens_per_second"], 0),
            number(row["ratio"]),
        ]
        for row in content["rows"]
    ]
    return layout(
        "Several processes",
        "How much faster do two processes sample rollouts than one?",
        [
            f"{config['rollouts']:,} rollouts of {config['new_tokens']} tokens from the embedded policy, sampled, "
            f"scored and written in shards of {config['shard_size']}, with one thread per process. Medians of "
            f"{config['repeats']} interleaved repeats, without start-up.",
            table(["processes", "rollouts per second", "tokens per second", "speed-up"], rows),
        ],
        ("processes", content),
    )
