"""The README's tables of what a tilt costs, from `results/decode.json`."""

from __future__ import annotations

from typing import Any

from lib.tables import read, table


def overhead() -> str:
    """The price of a tilt: tokens per second against plain `generate`, and what else a user waits or pays for."""
    content = read("decode")
    config, rows = content["config"], content["rows"]
    base = config["context"]
    policies = {"random": "random Llama 8 × 512, 32,000 tokens"}
    speeds = [row for row in rows if row["what"] == "speed"]
    near = {(row["policy"], *_kind(row), row["batch"]): row["ratio"] for row in speeds if row["context"] == base}
    batches = sorted({key[-1] for key in near})
    told = [
        [
            policies.get(key[0], key[0]),
            key[1],
            str(key[2]),
            str(key[3]),
            *(_share(near.get((*key, b))) for b in batches),
        ]
        for key in dict.fromkeys(key[:-1] for key in near)
        if key[0] == "random" or key[2:] == (2, 40)
    ]
    far = {
        (*_kind(row), row["context"]): row["ratio"] for row in speeds if row["policy"] == "random" and row["batch"] == 1
    }
    contexts = sorted({key[-1] for key in far if key[-1] != base})
    longer = [
        [key[0], *(_share(far.get((*key, context))) for context in contexts)]
        for key in dict.fromkeys(key[:-1] for key in far if key[-1] != base)
    ]
    first = [row for row in rows if row["what"] == "first token" and row["policy"] == "random"]
    waits = {(row["critic"] and _kind(row)[0], row["context"]): row for row in first}
    ends = sorted({context for _, context in waits})
    waited = [
        [
            critic or "plain",
            *(f"{waits[critic, context]['milliseconds']:.0f} ms" for context in ends),
            *(f"{waits[critic, context]['peak_mib']:.0f} MiB" for context in ends),
        ]
        for critic in dict.fromkeys(critic for critic, _ in waits)
    ]
    ragged = max(row["max_difference"] for row in rows if row["what"] == "ragged")
    helped = [
        [(row["critic"] and _kind(row)[0]) or "plain", row["what"], f"{row['ratio']:.2f}"]
        for row in rows
        if row["what"] in ("draft model", "prompt lookup")
    ]
    controls = [row["ratio"] for row in rows if row["what"] == "control"]
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Tokens per second of tilted decoding as a share of plain `generate` on {where} "
        f"(`benchmarks/bench_decode.py`; {config['new_tokens']} tokens after {base}, medians of {config['repeats']} "
        "rounds in which a way and plain decoding take a step each in turn). A value model has half the "
        "policy's layers and width; the official step is that of the paper's scripts, one such model for each "
        "objective, or one for all once they are distilled. Critics are of the independent composition where it does "
        "not say conditioned; those have one head more. Plain decoding beside itself comes to "
        f"{min(controls):.3f} to {max(controls):.3f}:\n\n"
        + table(["policy", "critic", "objectives", "candidates", *(f"batch {batch}" for batch in batches)], told)
        + "\nThe same for one longer prompt (random Llama, 2 objectives, 40 candidates):\n\n"
        + table(["critic", *(f"{context:,} tokens" for context in contexts)], longer)
        + f"\nWhat one prompt of {ends[0]:,} and of {ends[-1]:,} tokens waits for its first token, and the memory that "
        f"{config['new_tokens']} tokens take beside the weights:\n\n"
        + table(
            ["critic", *(f"first token, {c:,}" for c in ends), *(f"memory, {c:,}" for c in ends)],
            waited,
        )
        + "\nThe values of 16 prompts of different length in one batch differ from those of each alone by "
        f"{ragged:.0e} at most. Greedy assisted decoding gives the tokens it gives unassisted, so many times as fast "
        "(the draft has one layer and mostly agrees):\n\n" + table(["critic", "help", "speed"], helped)
    )


def _kind(row: dict[str, Any]) -> tuple[str, int, int]:
    names = {"hidden_state": "hidden state", "value_model": "value model", None: ""}
    parts = [names.get(row["critic"], row["critic"]), row["readout"]]
    if row.get("composition") == "conditioned":
        parts.append("conditioned")
    return ", ".join(filter(None, parts)), row["objectives"], row["top_k"]


def _share(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"
