"""How well a policy predicts text, in a unit that does not depend on its tokens: bits per byte."""

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
    """Return Σ −log₂ π(text | BOS) / Σ bytes(text), over all texts; less is better.

    Each text is begun with BOS, its end is not predicted. A text of more than `context` tokens is read
    through windows that move on by half a context, so every later token sees at least half a context.

    Args:
        policy: a causal LM; it is used as it is (put it into eval mode first).
        tokenizer: its tokenizer, with a BOS token (or an EOS token to begin with).
        texts: N texts.
        context: the longest input, at least 2; the policy's `max_position_embeddings` by default.

    Returns:
        Bits per UTF-8 byte.

    Raises:
        EvaluationError: there is no byte to predict, nothing to begin with, a character that the tokenizer
            does not know, or a context under 2.
    """
    size = int(context or policy.config.max_position_embeddings)
    if size < 2:
        raise EvaluationError(f"context is {size}, expected at least 2.", "a token needs one before it.")
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
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
                "an unknown token stands for any bytes, so the figure would be too low; leave the text out.",
            )
        nats += _nats(policy, torch.tensor([begin, *ids], device=policy.device), size)
    return nats / total_bytes / math.log(2)


def _nats(policy: PreTrainedModel, ids: torch.Tensor, context: int) -> float:
    """Return Σ −log π(ids[t] | window before t) over t ≥ 1; ids (T,)."""
    total, predicted = 0.0, 1
    while predicted < len(ids):
        # The first window predicts all it can; each later one repeats half a context and predicts the rest.
        start = 0 if predicted == 1 else predicted - context // 2
        window = ids[start : start + context]
        window_logits = policy(window[None], use_cache=False).logits[0]
        offset = predicted - start
        losses = F.cross_entropy(window_logits[offset - 1 : -1].float(), window[offset:], reduction="none")
        total += losses.double().sum().item()
        predicted = start + len(window)
    return total
