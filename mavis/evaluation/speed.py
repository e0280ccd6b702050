"""Tokens per second of tilted decoding beside plain decoding, measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mavis.decoding import MavisTilt


def tokens_per_second(run: Callable[[], Any], tokens: int, device: torch.device) -> float:
    """Time one run that makes a known number of tokens."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return tokens / (time.perf_counter() - start)


def compare_speed(
    policy: Any,
    inputs: Mapping[str, Tensor],
    tilts: Mapping[str, Callable[[], MavisTilt | None]],
    *,
    new_tokens: int,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Decode the same prompts in several ways, each between two plain runs, so that drifts of the machine cancel.

        ratio = median over rounds of (mean time of the plain runs before and after) / (time of the way)

    Args:
        policy: a causal LM.
        inputs: ids and mask, (B, L) each.
        tilts: for each way, what sets it up, untimed, and returns its processor; None decodes plainly. What is named
            `plain` sets up the plain runs, which need nothing unless it is there.
        new_tokens: T, the exact length of every response.
        repeats: rounds, ≥ 1, after one round that is not counted.

    Returns:
        For `plain` and each way `tokens_per_second` and `ratio`, medians over the rounds.
    """
    ways = {name: make for name, make in tilts.items() if name != "plain"}
    set_up_plain = tilts.get("plain", lambda: None)
    device = inputs["input_ids"].device
    tokens = len(inputs["input_ids"]) * new_tokens

    def seconds(make: Callable[[], MavisTilt | None]) -> float:
        tilt = make()

        def run() -> None:
            policy.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                logits_processor=tilt if tilt is not None else [],
            )

        return tokens / tokens_per_second(run, tokens, device)

    plain: list[float] = []
    own: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(repeats + 1):
        before = seconds(set_up_plain)
        for name, make in ways.items():
            tilted, after = seconds(make), seconds(set_up_plain)
            if round_number:  # in the first round caches fill and libraries load
                plain.append(before)
                own[name].append(tilted)
                ratios[name].append((before + after) / 2 / tilted)
            before = after
    return {"plain": {"tokens_per_second": tokens / median(plain), "ratio": 1.0}} | {
        name: {"tokens_per_second": tokens / median(own[name]), "ratio": median(ratios[name])} for name in ways
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
