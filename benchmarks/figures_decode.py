"""The README's table of what a tilt costs, from `results/decode.json`."""

from __future__ import annotations

from tables import read, table


def overhead() -> str:
    """The price of a tilt: tokens per second against plain `generate`."""
    content = read("decode")
    ratios = {
        (row["policy"], row["objectives"], row["top_k"], row["batch"]): f"{row['ratio']:.3f}" for row in content["rows"]
    }
    batches = sorted({batch for *_, batch in ratios})
    rows = [
        [
            {"random": "random Llama 8 × 512, 32,000 tokens"}.get(policy, policy),
            str(objectives),
            str(top_k),
            *(ratios.get((policy, objectives, top_k, batch), "–") for batch in batches),
        ]
        for policy, objectives, top_k in dict.fromkeys(key[:-1] for key in ratios)
    ]
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Tokens per second of tilted decoding as a share of plain `generate` on {where} "
        f"(`benchmarks/bench_decode.py`; "
        f"{content['config']['new_tokens']} tokens after {content['config']['context']}, medians of at least "
        f"{content['config']['repeats']} rounds in which each way runs between two plain runs):\n\n"
        + table(["policy", "objectives", "candidates", *(f"batch {batch}" for batch in batches)], rows)
    )
