"""What a sequence classifier is given: token ids padded so that its score does not depend on the padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mavis.policies.limits import embedding_rows


def pad_texts(model: Any, texts: Sequence[Sequence[int]], padding_id: int | None) -> tuple[Tensor, Tensor]:
    """Pad b lists of token ids on the right, and tell the model's config what the padding is.

    Args:
        model: a sequence classifier; a causal one reads the last token that is not padding.
        texts: b lists of at least one token id.
        padding_id: of `padding_of`.

    Returns:
        The token ids and, as 1, which of them are no padding, both (b, T) on the model's device.
    """
    if padding_id is None:
        # Padding must differ from every text's last token. Any other id will do: what is to the right of that token, or
        # masked, is never read.
        last_ids = {ids[-1] for ids in texts}
        padding_id = next(i for i in itertools.count() if i not in last_ids)
    model.config.get_text_config().pad_token_id = padding_id
    longest = max(len(ids) for ids in texts)
    input_ids = torch.full((len(texts), longest), padding_id, dtype=torch.long)
    is_token = torch.zeros((len(texts), longest), dtype=torch.long)
    for row, ids in enumerate(texts):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        is_token[row, : len(ids)] = 1
    return input_ids.to(model.device), is_token.to(model.device)


def padding_of(model: Any, tokenizer: Any) -> int | None:
    """Return the token that a tokenizer or a model pads with; None if neither has one that has an embedding."""
    padding_id = tokenizer.pad_token_id
    if padding_id is None:
        padding_id = model.config.get_text_config().pad_token_id
    # Some old checkpoints write -1 for none, and an added padding token may have no embedding; it is never read.
    if padding_id is not None and not 0 <= padding_id < embedding_rows(model):
        return None
    return padding_id


def read_positions(model: Any) -> int | None:
    """Return how many tokens a model can read; None if it does not say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the one after the padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return positions
