"""One decoding step: the candidates of the reference policy and the tilted distribution over them."""

from __future__ import annotations

import torch
from torch import Tensor

from mavis.errors import DecodingError

# Chunks of this many tokens: the cost of the scan and of the final selection balance near the square root of V/K.
_CHUNK = 64


def candidates(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the top-k tokens of every row, exactly, in no particular order.

    A row's K largest entries lie in the K chunks with the largest maxima, so a large vocabulary is scanned once for
    chunk maxima and only K chunks are searched.

    Args:
        scores: (B, V), floating; may hold −inf.
        top_k: K, 1 ≤ K ≤ V.

    Returns:
        The K largest scores and their token ids, (B, K) each; ties are broken arbitrarily.

    Raises:
        DecodingError: if `top_k` is not between 1 and V.
    """
    rows, vocabulary = scores.shape
    if not 1 <= top_k <= vocabulary:
        raise DecodingError(
            f"top_k is {top_k}, but the policy has {vocabulary} tokens; expected 1 ≤ top_k ≤ {vocabulary}.",
            "use top_k=None to make every token a candidate.",
        )
    chunks = vocabulary // _CHUNK
    if scores.device.type != "cpu" or chunks < 4 * top_k or vocabulary % _CHUNK:
        values, ids = scores.topk(top_k, sorted=False)
        return values, ids
    chunked = scores.view(rows, chunks, _CHUNK)
    chosen = chunked.amax(-1).topk(top_k, sorted=False).indices
    pool = chunked.gather(1, chosen[..., None].expand(-1, -1, _CHUNK)).view(rows, -1)
    values, position = pool.topk(top_k, sorted=False)
    return values, chosen.gather(1, position // _CHUNK) * _CHUNK + position % _CHUNK


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
    """
    return torch.log_softmax(logits / temperature + tilt if temperature != 1.0 else logits + tilt, dim=-1)
