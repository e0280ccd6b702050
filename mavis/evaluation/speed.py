"""Tokens per second of tilted and plain decoding, measured in turn."""

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
    """Decode the same prompts in several ways by turns, so that drifts of the machine meet all of them alike.

        ratio = median over rounds of (tokens/s of the way) / (tokens/s of plain decoding in the same round)

    Args:
        policy: a causal LM.
        inputs: ids and mask, (B, L) each.
        tilts: for each way, what sets it up, untimed, and returns its processor; None decodes plainly. `plain` is
            added in front if it is not among them.
        new_tokens: T, the exact length of every response.
        repeats: rounds, ≥ 1, after one round that is not counted.

    Returns:
        For each way `tokens_per_second` and `ratio`, medians over the rounds.
    """
    ways: dict[str, Callable[[], MavisTilt | None]] = {"plain": lambda: None, **tilts}
    device = inputs["input_ids"].device
    tokens = len(inputs["input_ids"]) * new_tokens
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(repeats + 1):
        # There and back again, so that no way always follows the same other one.
        for name, make in list(ways.items())[:: -1 if round_number % 2 else 1]:
            tilt = make()

            def run(tilt: MavisTilt | None = tilt) -> None:
                policy.generate(
                    **inputs,
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    logits_processor=tilt if tilt is not None else [],
                )

            speeds[name].append(tokens_per_second(run, tokens, device))
    counted = {name: values[1:] for name, values in speeds.items()}
    return {
        name: {
            "tokens_per_second": median(values),
            "ratio": median(own / plain for own, plain in zip(values, counted["plain"], strict=True)),
        }
        for name, values in counted.items()
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
