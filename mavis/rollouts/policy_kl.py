"""How far one policy is from another along the responses of the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mavis.math.kl import step_kl
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import embedding_shape, output_embedding
from mavis.rollouts.replay import Sequences, forward_sequences, rows_at_once


@torch.no_grad()
def response_kl(policy: Any, reference: Any, sequences: Sequences, *, temperature: float = 1.0) -> Tensor:
    """Sum the exact KL of every step of responses, the mean of which estimates the policy's KL to the reference.

        Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)),   s_t along a response that π sampled

    Args:
        policy: π, a causal LM.
        reference: π_ref, a causal LM with the same tokens.
        sequences: B prompts and the responses that `policy` gave.
        temperature: T > 0 of both policies.

    Returns:
        (B,) float64 on the CPU, nats per response, over all tokens; what follows a response's end costs nothing.
    """
    device, length = states_device(policy), sequences.is_response.shape[1]
    at_once = rows_at_once(device, length, embedding_shape(output_embedding(policy))[1])
    spent = []
    for at in range(0, len(sequences.ids), at_once):
        some = sequences.rows(slice(at, at + at_once))
        logprobs, reference_logprobs = (
            torch.log_softmax(forward_sequences(model, some)[1].to(device).float() / temperature, dim=-1)
            for model in (policy, reference)
        )
        steps = step_kl(logprobs, reference_logprobs) * some.is_response.to(device)
        spent.append(steps.double().sum(1).cpu())
    return torch.cat(spent)
