"""Decoding speed: what a tilt costs with transformers."""

from __future__ import annotations

from typing import Any

from lib.formatting import machine, number
from lib.results import read

from pages.layout import NAMES, table
from pages.layout import page as layout


def page() -> str:
    """Write the page from `results/decode.json`."""
    content = read("decode")
    config, rows = content["config"], content["rows"]
    controls = [row["ratio"] for row in rows if row["what"] == "control"]
    ragged = max(row["max_difference"] for row in rows if row["what"] == "ragged")
    return layout(
        "Decoding speed",
        "What does a tilt cost with transformers?",
        [
            f"The ratio of tokens per second to plain `generate` on {machine(content)}, for {config['new_tokens']} new "
            f"tokens after a prompt of {config['context']}. Tilted and plain decoding alternate step by step, so that "
            f"drifts of the machine cancel, and the ratio is a median over {config['repeats']} repeats. Plain decoding "
            f"compared with itself gives {min(controls):.3f} to {max(controls):.3f}.",
            "A value model has half the layers and half the width of the policy. The official step is that of the "
            "paper's scripts, with one such model per objective, or one in total once they are distilled. Critics have "
            "the independent composition unless they say conditioned, which adds one head. The random Llama has 8 "
            "layers of width 512 and 32,000 tokens.",
            _by_batch(rows, config["context"]),
            "## Longer prompts\n\nOne prompt, random Llama, 2 objectives, 40 candidates.",
            _by_context(rows, config["context"]),
            f"## Time to first token, and memory\n\nOne prompt, random Llama. Memory is the peak of generating "
            f"{config['new_tokens']} tokens, without the weights.",
            _first_token(rows),
            "## Assisted decoding\n\nSpeed relative to unassisted greedy decoding, with a draft of one layer that "
            "mostly agrees with the policy. Assisted decoding gives the same tokens as unassisted decoding.",
            _assisted(rows),
            "## Batches of different lengths\n\nThe values of 16 prompts of different lengths in one batch differ from "
            f"those of each prompt alone by at most {ragged:.0e}.",
        ],
        ("decode", content),
    )


def _by_batch(rows: list[dict[str, Any]], context: int) -> str:
    ratios = {
        (row["policy"], *_case(row), row["batch"]): row["ratio"]
        for row in rows
        if row["what"] == "speed" and row["context"] == context
    }
    batches = sorted({key[-1] for key in ratios})
    cells = [
        [
            NAMES.get(case[0], case[0]),
            *map(str, case[1:]),
            *(number(ratios.get((*case, batch)), 3) for batch in batches),
        ]
        for case in dict.fromkeys(key[:-1] for key in ratios)
        if case[0] == "random" or case[2:] == (2, 40)
    ]
    return table(["policy", "critic", "objectives", "candidates", *(f"batch {batch}" for batch in batches)], cells)


def _by_context(rows: list[dict[str, Any]], shortest: int) -> str:
    ratios = {
        (*_case(row), row["context"]): row["ratio"]
        for row in rows
        if row["what"] == "speed" and row["policy"] == "random" and row["batch"] == 1
    }
    contexts = sorted({key[-1] for key in ratios if key[-1] != shortest})
    cells = [
        [case[0], *(number(ratios.get((*case, context)), 3) for context in contexts)]
        for case in dict.fromkeys(key[:-1] for key in ratios if key[-1] != shortest)
    ]
    return table(["critic", *(f"{context:,} tokens" for context in contexts)], cells)


def _first_token(rows: list[dict[str, Any]]) -> str:
    measured = {
        (_critic(row), row["context"]): row
        for row in rows
        if row["what"] == "first token" and row["policy"] == "random"
    }
    contexts = sorted({context for _, context in measured})
    cells = [
        [
            critic,
            *(f"{measured[critic, context]['milliseconds']:,.0f} ms" for context in contexts),
            *(f"{measured[critic, context]['peak_mib']:,.0f} MiB" for context in contexts),
        ]
        for critic in dict.fromkeys(critic for critic, _ in measured)
    ]
    header = [f"first token, {c:,} tokens" for c in contexts] + [f"memory, {c:,} tokens" for c in contexts]
    return table(["critic", *header], cells)


def _assisted(rows: list[dict[str, Any]]) -> str:
    cells = [
        [_critic(row), row["what"], number(row["ratio"])]
        for row in rows
        if row["what"] in ("draft model", "prompt lookup")
    ]
    return table(["critic", "assistance", "speed"], cells)


def _case(row: dict[str, Any]) -> tuple[str, int, int]:
    return _critic(row), row["objectives"], row["top_k"]


def _critic(row: dict[str, Any]) -> str:
    """Name the critic of a row, or `plain`."""
    if row["critic"] is None:
        return "plain"
    conditioned = "conditioned" if row.get("composition") == "conditioned" else None
    return ", ".join(filter(None, (NAMES.get(row["critic"], row["critic"]), row["readout"], conditioned)))
