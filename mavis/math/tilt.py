"""One decoding step: the candidates of the reference policy and the tilted distribution over them."""

from __future__ import annotations

import torch
from torch import Tensor

from mavis.errors import DecodingError


def top_candidates(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the top-k tokens of every row, in no particular order.

    Args:
        scores: (B, V), floating; may hold −inf.
        top_k: K, 1 ≤ K ≤ V.

    Returns:
        The K largest scores and their token ids, (B, K) each; ties are broken arbitrarily.

    Raises:
        DecodingError: if `top_k` is not between 1 and V.

    Examples:
        >>> import torch
        >>> from mavis.math import top_candidates
        >>> scores, ids = top_candidates(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
        >>> sorted(ids[0].tolist())
        [1, 2]
    """
    vocabulary = scores.shape[1]
    if not 1 <= top_k <= vocabulary:
        raise DecodingError(
            f"top_k is {top_k}, but the policy has {vocabulary} tokens; expected 1 ≤ top_k ≤ {vocabulary}.",
            "use top_k=None to make every token a candidate.",
        )
    values, ids = scores.topk(top_k, sorted=False)
    return values, ids


def tilted_logprobs(logits: Tensor, tilt: Tensor, temperature: float = 1.0) -> Tensor:
    """Tilt a distribution and normalise it over its candidates.

        log π(a|s) = z_a/T + tilt_a − log Σ_b exp(z_b/T + tilt_b)

    Args:
        logits: (..., K), the reference policy's scores of the candidates, floating; −inf stays −inf.
        tilt: (..., K), Σ_m λ_m Q_m, in nats, finite.
        temperature: T > 0.

    Returns:
        (..., K), the log-probabilities of the candidates under the tilted policy.

    Source: MAVIS, arXiv 2508.13415 (the tilting function of its decoding rule, added after the division by T).

    Examples:
        >>> import math, torch
        >>> from mavis.math import tilted_logprobs
        >>> tilted_logprobs(torch.zeros(2), torch.tensor([math.log(3.0), 0.0])).exp()
        tensor([0.7500, 0.2500])
    """
    return torch.log_softmax(logits / temperature + tilt if temperature != 1.0 else logits + tilt, dim=-1)
