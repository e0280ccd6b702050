"""The KL between two policies along responses of the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mavis.math.kl import step_kl
from mavis.policies.devices import states_device
from mavis.policies.fingerprint import embedding_shape, output_embedding
from mavis.rollouts.replay import Sequences, forward_sequences, rows_per_chunk


@torch.no_grad()
def response_kl(policy: Any, reference: Any, sequences: Sequences, *, temperature: float = 1.0) -> Tensor:
    """Sum the exact per-step KL along each response; the mean estimates the policy's KL to the reference.

        Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)),   s_t along a response that π sampled

    Args:
        policy: π, a causal LM.
        reference: π_ref, a causal LM with the same tokens.
        sequences: B prompts and the responses that `policy` sampled.
        temperature: T > 0 of both policies.

    Returns:
        (B,) float64 on the CPU, nats per response; every token is a candidate, and padding counts 0.
    """
    device, length = states_device(policy), sequences.is_response.shape[1]
    chunk = rows_per_chunk(device, length, embedding_shape(output_embedding(policy))[1])
    totals = []
    for start in range(0, len(sequences.ids), chunk):
        part = sequences.rows(slice(start, start + chunk))
        logprobs, reference_logprobs = (
            torch.log_softmax(forward_sequences(model, part)[1].to(device).float() / temperature, dim=-1)
            for model in (policy, reference)
        )
        kl = step_kl(logprobs, reference_logprobs) * part.is_response.to(device)
        totals.append(kl.double().sum(1).cpu())
    return torch.cat(totals)
