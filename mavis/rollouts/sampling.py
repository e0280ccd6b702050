"""Samples one batch of responses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mavis.critics import TrainedDecoding
from mavis.decoding.settings import check_temperature
from mavis.errors import ConfigError, check_whole
from mavis.policies.chat import Prompt
from mavis.policies.devices import states_device
from mavis.policies.encoding import encode_prompts, unpadded_ids, until_end
from mavis.policies.fingerprint import embedding_shape, output_embedding
from mavis.policies.generation_config import end_token_ids, neutral_generation_config

_EVERY_TOKEN = "top_k=None makes every token a candidate."


@dataclass(frozen=True)
class RolloutSettings:
    """Settings for sampling responses.

    Args:
        max_new_tokens: longest response in tokens, ≥ 1.
        top_k: number of candidates, of plain and tilted rows alike; None means every token.
        temperature: T > 0.
        shard_size: how many responses are sampled and written together, ≥ 1.
        seed: of all sampling.
        min_new_tokens: n ≥ 0: no end token is among a response's first n tokens, for policies that stop at once. The
            reference policy is then the one that cannot stop there, for candidates, rewards and KL alike.

    Raises:
        ConfigError: if a number is out of range.

    Examples:
        >>> from mavis.rollouts import RolloutSettings
        >>> RolloutSettings(top_k=40)
        RolloutSettings(max_new_tokens=64, top_k=40, temperature=1.0, shard_size=256, seed=0, min_new_tokens=0)
    """

    max_new_tokens: int = TrainedDecoding.max_new_tokens
    top_k: int | None = TrainedDecoding.top_k
    temperature: float = TrainedDecoding.temperature
    shard_size: int = 256
    seed: int = 0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        sizes = {"max_new_tokens": self.max_new_tokens, "shard_size": self.shard_size}
        check_whole(ConfigError, "the defaults are 64 and 256.", **sizes)
        check_whole(ConfigError, "0 is the default.", 0, seed=self.seed)
        hint = "0 lets responses end at once."
        check_whole(ConfigError, hint, 0, min_new_tokens=self.min_new_tokens)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, but max_new_tokens {self.max_new_tokens}.", hint
            )
        if self.top_k is not None:
            check_whole(ConfigError, _EVERY_TOKEN, top_k=self.top_k)
        check_temperature(ConfigError, self.temperature, "1.0 leaves the policy as it is.")

    def trained_decoding(self) -> TrainedDecoding:
        """Return the settings that a critic trained on these rollouts stores."""
        return TrainedDecoding(self.top_k, self.temperature, self.max_new_tokens)

    @property
    def lengths(self) -> dict[str, Any]:
        """The arguments of `generate` that limit a response's length."""
        shortest = {"min_new_tokens": self.min_new_tokens} if self.min_new_tokens else {}
        return {"max_new_tokens": self.max_new_tokens, **shortest}

    def check(self, policy: Any) -> None:
        """Check that a policy has at least `top_k` tokens.

        Raises:
            ConfigError: if `top_k` is larger than the vocabulary.
        """
        _, vocabulary = embedding_shape(output_embedding(policy))
        if self.top_k is not None and self.top_k > vocabulary:
            raise ConfigError(
                f"top_k is {self.top_k}, but the policy has {vocabulary} tokens.",
                _EVERY_TOKEN,
            )


def sample(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: RolloutSettings,
    seed: int,
    *,
    top_k: int | None = None,
    processors: Sequence[Any] = (),
) -> tuple[list[list[int]], list[list[int]]]:
    """Sample one response to each prompt, all in one batch.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        prompts: B texts or conversations.
        settings: of which the lengths and the temperature are used.
        seed: of this batch; the random state of the process is left alone.
        top_k: the number of candidates that `generate` truncates to; None keeps every token that the processor keeps.
        processors: logits processors that are called at every step.

    Returns:
        The token ids of the prompts, without padding, and of the responses, up to and including the first end token:
        choosing to stop is a step like any other.
    """
    inputs = encode_prompts(tokenizer, prompts)
    device = states_device(policy)
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    config, _ = neutral_generation_config(policy, settings.temperature, settings.lengths)
    if top_k is not None:
        config.top_k = top_k
    if tokenizer.pad_token_id is not None:  # the policy's own may have no embedding
        config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = policy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=False,  # each process samples its own shards, even where the weights of a fit are sharded
            logits_processor=list(processors),
        )
    end_ids = end_token_ids(policy)
    return unpadded_ids(inputs), [until_end(row, end_ids) for row in output[:, ids.shape[1] :].tolist()]


def shard_seed(seed: int, digest: str, index: int) -> int:
    """Derive the seed of one shard of a plan."""
    return int(hashlib.sha256(f"{seed}/{digest}/{index}".encode()).hexdigest()[:15], 16)
