"""A second look at responses: what the policy that sampled them saw and did at every step, in one forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mavis.critics.head_critic import HeadCritic
from mavis.math.kl import step_kl
from mavis.math.tilt import tilted_logprobs, top_candidates
from mavis.policies.devices import states_device
from mavis.policies.state_capture import forward_states

ROWS_PER_PASS = 32
"""How many rollouts are read again in one pass of the policy."""

# How many logits are worked on at once, on an accelerator and on a CPU: there a few megabytes stay in its cache, and
# larger temporaries would cost more in fresh memory pages than in arithmetic.
_LOGITS_AT_ONCE = (1 << 27, 1 << 20)


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

    def rows(self, rows: slice) -> Sequences:
        """Take some of them."""
        return Sequences(self.ids[rows], self.is_token[rows], self.is_response[rows])


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
def forward_sequences(policy: Any, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Read finished responses in one forward pass, as `generate` would have step by step.

    Args:
        policy: a causal LM.
        sequences: B prompts and responses.

    Returns:
        The last hidden states (B, T, H) and the logits (B, T, V) that each response token is drawn from, on the
        policy's device.
    """
    device, length = states_device(policy), sequences.is_response.shape[1]
    ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": is_token.long(), "use_cache": False}
    accepted = inspect.signature(policy.forward).parameters
    if "position_ids" in accepted:  # as `generate` counts: padding has no position
        inputs["position_ids"] = (is_token.long().cumsum(1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = length + 1
    states, logits = forward_states(policy, **inputs)
    return states[:, -length - 1 : -1], logits[:, -length - 1 : -1]


def rows_at_once(device: torch.device, length: int, vocabulary: int) -> int:
    """Say how many rows' logits (length, vocabulary) are worked on at once, ≥ 1."""
    return max(1, _LOGITS_AT_ONCE[device.type == "cpu"] // (length * vocabulary))


@torch.no_grad()
def replay(
    policy: Any,
    sequences: Sequences,
    embeddings: Tensor,
    *,
    critic: HeadCritic | None = None,
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
    device = states_device(policy)
    ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
    is_response = sequences.is_response.to(device)
    length = is_response.shape[1]
    states, logits = forward_sequences(policy, sequences)
    action_ids, table = ids[:, -length:], embeddings.to(device)
    lam = lam.to(device) if lam is not None else None
    inputs_of_heads = critic.inputs_of_rollouts(ids, is_token, states) if critic is not None else states
    at_once = rows_at_once(device, length, logits.shape[2])
    parts = [
        _figures(
            inputs_of_heads[rows].flatten(0, 1),
            logits[rows].flatten(0, 1).float(),
            action_ids[rows].flatten(),
            table,
            critic,
            lam[rows].repeat_interleave(length, dim=0) if lam is not None else None,
            top_k,
            temperature,
        )
        for rows in (slice(at, at + at_once) for at in range(0, len(ids), at_once))
    ]
    expected, kl, reference_logprobs = (
        torch.cat(figure).unflatten(0, (-1, length)) for figure in zip(*parts, strict=True)
    )
    return Steps(
        states=states,
        action_ids=action_ids,
        expected=expected,
        kl=kl * is_response,
        reference_logprobs=reference_logprobs * is_response,
        is_response=is_response,
    )


def _figures(
    inputs: Tensor,
    logits: Tensor,
    action_ids: Tensor,
    table: Tensor,
    critic: HeadCritic | None,
    lam: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute expected embedding (S, E), KL (S,) and log π_ref of the action (S,) for S steps."""
    scaled = logits / temperature if temperature != 1.0 else logits
    whole = torch.logsumexp(scaled, dim=-1, keepdim=True)
    taken = (scaled.gather(1, action_ids[:, None]) - whole)[:, 0]
    kept, kept_ids = top_candidates(scaled, top_k) if top_k is not None else (scaled, None)
    if critic is None:
        logprobs = torch.log_softmax(kept, dim=-1)
    else:
        assert lam is not None
        logprobs = tilted_logprobs(kept, critic.tilt_of_inputs(inputs, kept_ids, lam))
    probs = logprobs.exp()
    if kept_ids is None:
        expected = probs @ table
    else:
        expected = F.embedding_bag(kept_ids, table, per_sample_weights=probs, mode="sum")
    if critic is None and top_k is None:  # the reference policy itself
        return expected, torch.zeros_like(taken), taken
    return expected, step_kl(logprobs, kept - whole), taken
