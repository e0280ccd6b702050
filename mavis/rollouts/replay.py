"""A second look at responses: what the policy that sampled them saw and did at every step, in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics import HiddenStateCritic
from mavis.critics.capture import forward_states
from mavis.math.divergence import step_kl
from mavis.math.tilt import candidates, tilted_logprobs


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses side by side: prompts padded on the left, responses on the right.

    Args:
        ids: (B, P + T) integer.
        is_token: (B, P + T) bool, True on prompt and response tokens, False on padding.
        is_response: (B, T) bool, True on response tokens.
    """

    ids: Tensor
    is_token: Tensor
    is_response: Tensor

    @classmethod
    def pack(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Sequences:
        """Lay lists of token ids out as tensors; responses may be empty, prompts may not."""
        before, after = max(map(len, prompts)), max(1, *map(len, responses))
        ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
        is_token = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, stop = before - len(prompt), before + len(response)
            ids[row, start:stop] = torch.tensor([*prompt, *response])
            is_token[row, start:stop] = True
        return cls(ids, is_token, is_token[:, before:].clone())


@dataclass(frozen=True)
class Steps:
    """What was true at each step of B responses.

    Args:
        states: (B, T, H), the policy's last hidden state from which step t's token was drawn.
        action_ids: (B, T) integer, the tokens drawn.
        expected: (B, T, E) float32, E_{a∼π}[e_a] under the policy that sampled.
        kl: (B, T) float32, KL(π ‖ π_ref) in nats, 0 after a response's end.
        reference_logprobs: (B, T) float32, log π_ref of the tokens drawn, 0 after a response's end.
        is_response: (B, T) bool.
    """

    states: Tensor
    action_ids: Tensor
    expected: Tensor
    kl: Tensor
    reference_logprobs: Tensor
    is_response: Tensor


@torch.no_grad()
def replay(
    policy: Any,
    sequences: Sequences,
    embeddings: Tensor,
    *,
    critic: HiddenStateCritic | None = None,
    lam: Tensor | None = None,
    top_k: int | None,
    temperature: float = 1.0,
) -> Steps:
    """Recompute states, distributions and KL of responses that a tilted or plain policy has sampled.

    Args:
        policy: the reference policy.
        sequences: what it was asked and what it said.
        embeddings: (V, E) float32 vectors e_a to average.
        critic: that tilted the policy; None for the reference policy cut to its top-k.
        lam: (B, M) float32 λ of each row, not zero anywhere in M at once; only with a critic.
        top_k: candidates the responses were drawn from; None means all.
        temperature: T they were drawn at.

    Returns:
        The steps, on the policy's device.
    """
    device = policy.get_output_embeddings().weight.device
    ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
    is_response = sequences.is_response.to(device)
    length = is_response.shape[1]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": is_token.long(), "use_cache": False}
    accepted = inspect.signature(policy.forward).parameters
    if "position_ids" in accepted:  # as `generate` counts: padding has no position
        inputs["position_ids"] = (is_token.long().cumsum(1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = length + 1
    states, logits = forward_states(policy, **inputs)
    states, logits = states[:, -length - 1 : -1], logits[:, -length - 1 : -1].float()

    flat_states, flat_logits = states.flatten(0, 1), logits.flatten(0, 1)
    kept, kept_ids = candidates(flat_logits, top_k) if top_k is not None else (flat_logits, None)
    if critic is None:
        tilt = torch.zeros_like(kept)
    else:
        assert lam is not None
        spread = lam.to(device).repeat_interleave(length, dim=0)
        tilt = critic.tilt_of_states(flat_states, kept_ids, spread)
    logprobs = tilted_logprobs(kept, tilt, temperature)
    whole = torch.logsumexp(flat_logits / temperature, dim=-1, keepdim=True)
    kl = step_kl(logprobs, kept / temperature - whole).unflatten(0, (-1, length))
    action_ids = ids[:, -length:]
    taken = flat_logits.gather(1, action_ids.flatten()[:, None])
    table = embeddings.to(device)
    if kept_ids is None:
        expected = logprobs.exp() @ table
    else:
        expected = F.embedding_bag(kept_ids, table, per_sample_weights=logprobs.exp(), mode="sum")
    return Steps(
        states=states,
        action_ids=action_ids,
        expected=expected.unflatten(0, (-1, length)),
        kl=kl * is_response,
        reference_logprobs=(taken / temperature - whole)[:, 0].unflatten(0, (-1, length)) * is_response,
        is_response=is_response,
    )
