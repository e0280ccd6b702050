"""Replays responses: the states, distributions and KL of every step, in one forward pass."""

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
from mavis.policies.generation_config import end_token_ids
from mavis.policies.state_capture import forward_states

ROWS_PER_PASS = 32
"""How many rollouts are replayed in one forward pass of the policy."""

# How many logits are processed in one chunk. On a CPU a few megabytes stay in its cache; larger temporaries would cost
# more in fresh memory pages than in arithmetic.
_LOGITS_PER_CHUNK = 1 << 27
_LOGITS_PER_CHUNK_ON_CPU = 1 << 20


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
        """Pack lists of token ids into tensors; responses may be empty, prompts may not."""
        before, after = max(map(len, prompts)), max(1, *map(len, responses))
        ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
        is_token = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            start, stop = before - len(prompt), before + len(response)
            ids[row, start:stop] = torch.tensor([*prompt, *response])
            is_token[row, start:stop] = True
        return cls(ids, is_token, is_token[:, before:].clone())

    def rows(self, rows: slice) -> Sequences:
        """Select some rows."""
        return Sequences(self.ids[rows], self.is_token[rows], self.is_response[rows])


@dataclass(frozen=True)
class ReplayedSteps:
    """States, distributions and KL at each step of B responses.

    Args:
        states: (B, T, H), the policy's last hidden state from which step t's token was drawn.
        action_ids: (B, T) integer, the tokens that were drawn.
        expected: (B, T, E) float32, E_{a∼π}[e_a] under the policy that sampled.
        kl: (B, T) float32, KL(π ‖ π_ref) in nats, 0 after a response's end.
        reference_logprobs: (B, T) float32, log π_ref of those tokens, 0 after a response's end.
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
    """Run finished responses through a policy in one forward pass, with the positions that `generate` would use.

    Args:
        policy: a causal LM.
        sequences: B prompts and responses.

    Returns:
        The last hidden states (B, T, H) and logits (B, T, V) from which each response token was drawn, on the policy's
        device.
    """
    device, length = states_device(policy), sequences.is_response.shape[1]
    ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": is_token.long(), "use_cache": False}
    accepted = inspect.signature(policy.forward).parameters
    if "position_ids" in accepted:  # counted as by `generate`: padding has no position
        inputs["position_ids"] = (is_token.long().cumsum(1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = length + 1
    states, logits = forward_states(policy, **inputs)
    return states[:, -length - 1 : -1], logits[:, -length - 1 : -1]


def rows_per_chunk(device: torch.device, length: int, vocabulary: int) -> int:
    """Compute how many rows of logits (length, vocabulary) to process at once, ≥ 1."""
    logits = _LOGITS_PER_CHUNK_ON_CPU if device.type == "cpu" else _LOGITS_PER_CHUNK
    return max(1, logits // (length * vocabulary))


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
    min_new_tokens: int = 0,
) -> ReplayedSteps:
    """Recompute the states, distributions and KL of responses that a tilted or plain policy has sampled.

    Args:
        policy: the reference policy.
        sequences: the prompts and responses.
        embeddings: (V, E) float32 vectors e_a to average.
        critic: tilted the policy; None for the reference policy truncated to its top-k.
        lam: (B, M) float32, λ of each row; only with a critic. Rows of zeros are truncated like any other.
        top_k: number of candidates that the responses were drawn from; None means every token.
        temperature: T at which they were drawn.
        min_new_tokens: how many of each response's first tokens could not be end tokens; the reference policy is the
            one that cannot stop there.

    Returns:
        The steps, on the policy's device.
    """
    device = states_device(policy)
    ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
    is_response = sequences.is_response.to(device)
    length = is_response.shape[1]
    states, logits = forward_sequences(policy, sequences)
    if min_new_tokens and (ends := sorted(end_token_ids(policy))):
        logits[:, :min_new_tokens, ends] = -torch.inf
    action_ids, table = ids[:, -length:], embeddings.to(device)
    lam = lam.to(device) if lam is not None else None
    head_inputs = critic.rollout_inputs(ids, is_token, states) if critic is not None else states
    chunk = rows_per_chunk(device, length, logits.shape[2])
    parts = [
        _step_quantities(
            head_inputs[rows].flatten(0, 1),
            logits[rows].flatten(0, 1).float(),
            action_ids[rows].flatten(),
            table,
            critic,
            lam[rows].repeat_interleave(length, dim=0) if lam is not None else None,
            top_k,
            temperature,
        )
        for rows in (slice(start, start + chunk) for start in range(0, len(ids), chunk))
    ]
    expected, kl, reference_logprobs = (
        torch.cat(quantity).unflatten(0, (-1, length)) for quantity in zip(*parts, strict=True)
    )
    return ReplayedSteps(
        states=states,
        action_ids=action_ids,
        expected=expected,
        kl=kl * is_response,
        reference_logprobs=reference_logprobs * is_response,
        is_response=is_response,
    )


def _step_quantities(
    inputs: Tensor,
    logits: Tensor,
    action_ids: Tensor,
    table: Tensor,
    critic: HeadCritic | None,
    lam: Tensor | None,
    top_k: int | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the expected embedding (S, E), the KL (S,) and log π_ref of the action (S,) of S steps."""
    scaled = logits / temperature if temperature != 1.0 else logits
    normaliser = torch.logsumexp(scaled, dim=-1, keepdim=True)
    action_logprobs = (scaled.gather(1, action_ids[:, None]) - normaliser)[:, 0]
    kept, kept_ids = top_candidates(scaled, top_k) if top_k is not None else (scaled, None)
    if critic is None:
        logprobs = torch.log_softmax(kept, dim=-1)
    else:
        assert lam is not None
        logprobs = tilted_logprobs(kept, critic.tilt_from_inputs(inputs, kept_ids, lam))
    probs = logprobs.exp()
    if kept_ids is None:
        expected = probs @ table
    else:
        expected = F.embedding_bag(kept_ids, table, per_sample_weights=probs, mode="sum")
    if critic is None and top_k is None:  # the reference policy itself
        return expected, torch.zeros_like(action_logprobs), action_logprobs
    return expected, step_kl(logprobs, kept - normaliser), action_logprobs
