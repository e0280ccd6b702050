"""Tokens per second of tilted and plain decoding, timed in alternation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic
from mavis.decoding import MavisTilt
from mavis.evaluation.settings import EvaluationSettings
from mavis.policies.chat import Prompt
from mavis.policies.devices import states_device
from mavis.policies.encoding import encode_prompts
from mavis.policies.generation_config import neutral_generation_config


def measure_speed(
    policy: Any, tokenizer: Any, critic: Critic, prompts: Sequence[Prompt], settings: EvaluationSettings
) -> dict[str, Any]:
    """Compare tilted with plain decoding on the evaluation prompts.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: tilts with equal weights at β = 1.
        prompts: at least one; repeated to fill the batch.
        settings: the batch, the repeats and the length of a response.

    Returns:
        `plain` and `tilted` of `compare_speed`, and the `batch`; empty if `speed_repeats` is 0.
    """
    if settings.speed_repeats < 1:
        return {}
    encoded = encode_prompts(tokenizer, [prompts[i % len(prompts)] for i in range(settings.speed_batch)])
    device = states_device(policy)
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    equal = [1 / len(critic.objectives)] * len(critic.objectives)
    # Plain decoding must not pay for the critic's hooks; but a critic that the caller attached stays attached.
    owns_attachment = critic.attached_policy is None

    def plain() -> None:
        if owns_attachment:
            critic.detach()

    def tilted() -> MavisTilt:
        if owns_attachment:
            critic.detach()
            critic.attach(policy)
        return MavisTilt(equal, critic, beta=1.0, top_k=settings.sampling.top_k)

    try:
        speeds = compare_speed(
            policy,
            inputs,
            {"plain": plain, "tilted": tilted},
            new_tokens=settings.sampling.max_new_tokens,
            repeats=settings.speed_repeats,
        )
    finally:
        plain()
    return {**speeds, "batch": settings.speed_batch}


def compare_speed(
    policy: Any,
    inputs: Mapping[str, Tensor],
    methods: Mapping[str, Callable[[], MavisTilt | None]],
    *,
    new_tokens: int,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Time several ways of decoding the same prompts, each between two plain runs, so that machine drift cancels.

        ratio = median over repeats of (mean time of the plain runs before and after) / (time of the method)

    Args:
        policy: a causal LM.
        inputs: ids and mask, (B, L) each.
        methods: by name, a function that sets the method up, untimed, and returns its processor; None decodes plainly.
            An optional `plain` sets up the plain runs.
        new_tokens: T, the exact length of every response.
        repeats: ≥ 1, after a warm-up that is not counted.

    Returns:
        For `plain` and each method `tokens_per_second` and `ratio`, medians over the repeats.
    """
    set_up_plain = methods.get("plain", lambda: None)
    methods = {name: set_up for name, set_up in methods.items() if name != "plain"}
    device = inputs["input_ids"].device
    tokens = len(inputs["input_ids"]) * new_tokens

    def seconds(set_up: Callable[[], MavisTilt | None]) -> float:
        tilt = set_up()
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        # The policy's own config could ask for beams or a time limit.
        config, _ = neutral_generation_config(policy, getattr(tilt, "temperature", 1.0), length)

        def run() -> None:
            policy.generate(**inputs, generation_config=config, logits_processor=tilt if tilt is not None else [])

        return tokens / tokens_per_second(run, tokens, device)

    plain: list[float] = []
    own: dict[str, list[float]] = {name: [] for name in methods}
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        before = seconds(set_up_plain)
        for name, set_up in methods.items():
            tilted, after = seconds(set_up), seconds(set_up_plain)
            if repeat:  # the first one warms up: caches fill and libraries load
                plain.append(before)
                own[name].append(tilted)
                ratios[name].append((before + after) / 2 / tilted)
            before = after
    return {"plain": {"tokens_per_second": tokens / median(plain), "ratio": 1.0}} | {
        name: {"tokens_per_second": tokens / median(own[name]), "ratio": median(ratios[name])} for name in methods
    }


def tokens_per_second(run: Callable[[], Any], tokens: int, device: torch.device) -> float:
    """Time one run that generates a known number of tokens."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return tokens / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
