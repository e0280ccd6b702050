"""Sampling responses: how, and one batch of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mavis.critics import TrainedDecoding
from mavis.errors import ConfigError
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import embedding_shape, output_embedding
from mavis.policies.generation_config import end_token_ids, neutral_generation_config


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response in tokens, ≥ 1.
        top_k: number of candidates, of plain and tilted rows alike; None means every token.
        temperature: T > 0.
        shard_size: rows sampled together and written together, ≥ 1.
        seed: of all sampling.

    Raises:
        ConfigError: if a number is out of range.
    """

    max_new_tokens: int = TrainedDecoding.max_new_tokens
    top_k: int | None = TrainedDecoding.top_k
    temperature: float = TrainedDecoding.temperature
    shard_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.shard_size < 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}, shard_size is {self.shard_size} and top_k is {self.top_k}; "
                "expected each ≥ 1.",
                "top_k=None makes every token a candidate.",
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}, expected a number > 0.", "1.0 changes nothing.")

    def trained_decoding(self) -> TrainedDecoding:
        """Return what a critic that learns from these rollouts remembers of them."""
        return TrainedDecoding(self.top_k, self.temperature, self.max_new_tokens)

    def check(self, policy: Any) -> None:
        """Refuse a policy that has fewer tokens than there are to be candidates.

        Raises:
            ConfigError: if `top_k` is larger than the vocabulary.
        """
        _, vocabulary = embedding_shape(output_embedding(policy))
        if self.top_k is not None and self.top_k > vocabulary:
            raise ConfigError(
                f"top_k is {self.top_k}, but the policy has {vocabulary} tokens.",
                "top_k=None makes every token a candidate.",
            )


def sample(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: RolloutSettings,
    seed: int,
    *,
    top_k: int | None = None,
    processor: Any = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Sample one response to each prompt, all in one batch.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        prompts: B texts.
        settings: the length and the temperature count here.
        seed: of this batch; the random numbers of the process stay as they are.
        top_k: candidates that `generate` cuts to; None leaves every token, or what the processor leaves of them.
        processor: a logits processor that sees every step.

    Returns:
        The token ids of the prompts, without padding, and those of the responses, up to the first end token and with
        it: choosing to stop is a step like any other.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    device = states_device(policy)
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    config, _ = neutral_generation_config(policy, settings.temperature, {"max_new_tokens": settings.max_new_tokens})
    if top_k is not None:
        config.top_k = top_k
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=False,  # each process samples what is its own, whatever shards the weights of a fit
            logits_processor=[processor] if processor is not None else [],
        )
    kept = inputs["attention_mask"].bool()
    prompt_ids = [row[is_token].tolist() for row, is_token in zip(inputs["input_ids"], kept, strict=True)]
    end = end_token_ids(policy)
    return prompt_ids, [_until_end(row, end) for row in output[:, ids.shape[1] :].tolist()]


def shard_seed(seed: int, digest: str, index: int) -> int:
    """Give each shard of a plan a seed of its own."""
    return int(hashlib.sha256(f"{seed}/{digest}/{index}".encode()).hexdigest()[:15], 16)


def _until_end(ids: list[int], end: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in end:
            return ids[: position + 1]
    return ids
