"""Bits per byte: how well a policy predicts text, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from mavis.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def bits_per_byte(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int | None = None,
) -> float:
    """Compute the bits per byte of texts under a policy; less is better.

        Σ −log₂ π(text | BOS) / Σ bytes(text)

    Each text starts with BOS; its end is not predicted. Texts of more than `context` tokens are read in windows that
    overlap by half, so every later token sees at least half a context.

    Args:
        policy: a causal LM, in eval mode.
        tokenizer: its tokenizer, with a BOS token, or an EOS token to use instead.
        texts: N texts.
        context: the longest input, at least 2; the policy's `max_position_embeddings` by default.

    Returns:
        Bits per UTF-8 byte.

    Raises:
        EvaluationError: if there is no byte to predict, the tokenizer has neither token or does not know a character,
            or the context is under 2.
    """
    size = int(context or policy.config.max_position_embeddings)
    if size < 2:
        raise EvaluationError(f"context is {size}, expected at least 2.", "every predicted token needs one before it.")
    start_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start_id is None:
        raise EvaluationError("the tokenizer has neither BOS nor EOS.", "set tokenizer.bos_token.")
    total_bytes = sum(len(text.encode()) for text in texts)
    if not total_bytes:
        raise EvaluationError(f"{len(texts)} texts hold no byte.", "give at least one text that is not empty.")
    nats = 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise EvaluationError(
                f"the tokenizer does not know every character of {text[:40]!r}.",
                "an unknown token stands for any bytes, so the result would be too low; leave the text out.",
            )
        nats += _nats(policy, torch.tensor([start_id, *ids], device=policy.device), size)
    return nats / total_bytes / math.log(2)


def _nats(policy: PreTrainedModel, ids: torch.Tensor, context: int) -> float:
    """Compute Σ −log π(ids[t] | window before t) over t ≥ 1; ids (T,)."""
    total, predicted = 0.0, 1
    while predicted < len(ids):
        # The first window predicts all its tokens; later ones repeat half a context and predict the other half.
        start = 0 if predicted == 1 else predicted - context // 2
        window = ids[start : start + context]
        window_logits = policy(window[None], use_cache=False).logits[0]
        offset = predicted - start
        losses = F.cross_entropy(window_logits[offset - 1 : -1].float(), window[offset:], reduction="none")
        total += losses.double().sum().item()
        predicted = start + len(window)
    return total
