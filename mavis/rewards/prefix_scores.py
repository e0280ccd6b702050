"""Scores of every prefix of a response, by one forward pass of a causal reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mavis.errors import ObjectiveError
from mavis.policies.chat import Prompt
from mavis.policies.encoding import surplus_bos
from mavis.rewards.reward_texts import check_token_ids, split_unfinished

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_ROUGH_TOLERANCE = 0.05  # of half precision, as for batches


@dataclass(frozen=True)
class PrefixText:
    """The tokens of a prompt with an unfinished response.

    Args:
        ids: all token ids, without those that the tokenizer adds at the end.
        positions: where the tokens of the response are.
        characters: how many characters of the response each of them ends at.
    """

    ids: list[int]
    positions: list[int]
    characters: list[int]


def encode_prefixes(
    model: str, tokenizer: Any, template: str, prompt: Prompt, response: str, max_length: int, embeddings: int
) -> PrefixText:
    """Tokenize a prompt with an unfinished response, cut on the left to at most `max_length` tokens.

    Args:
        model: name of the reward model, for errors.
        tokenizer: of the reward model.
        template: see `RewardModel`.
        prompt: a text, without any template, or a conversation.
        response: what the policy wrote.
        max_length: the most tokens.
        embeddings: how many tokens the model has embeddings of.

    Raises:
        ObjectiveError: if the tokenizer cannot say which characters a token stands for, the response is not the last
            part of the text, or it is longer than `max_length` by itself.
    """
    if not tokenizer.is_fast:
        raise ObjectiveError(
            f"reward model {model!r} has a slow tokenizer, which does not say where a token's characters are.",
            "save a fast tokenizer with the model.",
        )
    before, shown = split_unfinished(template, tokenizer, prompt, response)
    encoded = tokenizer(
        before + shown,
        return_offsets_mapping=True,
        add_special_tokens=template != "chat",
        truncation=False,
        verbose=False,
    )
    surplus = surplus_bos(tokenizer, encoded["input_ids"])
    ids, offsets = list(encoded["input_ids"][surplus:]), list(encoded["offset_mapping"][surplus:])
    positions = [index for index, (start, end) in enumerate(offsets) if end > max(start, len(before))]
    if positions:
        ids = ids[: positions[-1] + 1]
    if len(positions) > max_length:
        raise ObjectiveError(
            f"max_length is {max_length}, but a response has {len(positions)} tokens, whose first prefixes would have "
            "no score.",
            f"set max_length={len(positions)} or more, or score shorter responses.",
        )
    check_token_ids(model, tokenizer, [ids], embeddings)
    cut = max(len(ids) - max_length, 0)
    characters = [offsets[position][1] - len(before) for position in positions]
    return PrefixText(ids[cut:] or [0], [position - cut for position in positions], characters)


def prefix_logits(model: Any, input_ids: Tensor, is_token: Tensor) -> Tensor:
    """Compute the logits after every token, float64 on the CPU.

    Args:
        model: a causal sequence classifier.
        input_ids: (b, T), padded on the right.
        is_token: (b, T), 1 where a token is no padding.

    Returns:
        Logits (b, T, labels).
    """
    with torch.inference_mode():
        states = model.base_model(input_ids=input_ids, attention_mask=is_token).last_hidden_state
        return model.score(states).to("cpu", torch.float64)


def check_causal(
    name: str, model: Any, ids: Sequence[int], padding_id: int | None, logits: Callable[[list[int]], Tensor]
) -> None:
    """Check that the score after a token does not depend on later tokens.

    Args:
        name: of the reward model, for the error.
        model: a sequence classifier.
        ids: of a text; its first half is scored alone and within the whole.
        padding_id: what the model pads with, if anything.
        logits: computes the logits (1, labels) of a text by itself.

    Raises:
        ObjectiveError: if the model has no head that reads one position, or the two scores differ.
    """
    half = list(ids[: (len(ids) + 1) // 2])
    while half and half[-1] == padding_id:  # such as the end of a turn, which a text by itself is not read to
        half.pop()
    is_causal = hasattr(model, "score")
    if is_causal and half:
        input_ids = torch.tensor([list(ids)], device=model.device)
        within = prefix_logits(model, input_ids, torch.ones_like(input_ids))[:, len(half) - 1]
        alone = logits(half)
        tolerance = _TOLERANCE.get(model.dtype, _ROUGH_TOLERANCE) * max(1.0, float(alone.abs().max()))
        is_causal = float((within - alone).abs().max()) <= tolerance
    if not is_causal:
        raise ObjectiveError(
            f"reward model {name!r} ({type(model).__name__}) reads its text in both directions, so that a "
            "prefix has no score of its own in it.",
            "train one with a causal backbone: mavis train-reward.",
        )
