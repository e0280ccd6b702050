"""Preference pairs as token ids, and which of them are held out."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mavis.data import Pair
from mavis.errors import PromptError, TrainingError, warn_user
from mavis.policies.chat import is_conversation, last_user_turn
from mavis.policies.limits import embedding_rows
from mavis.rewards.reward_texts import check_vocabulary, encode_texts, fill_template
from mavis.training.reward_model.settings import AUTO, RewardModelSettings

LEAST_HELD_OUT = 8
"""Fewer pairs would say nothing about a reward model."""


@dataclass(frozen=True)
class EncodedPair:
    """A pair as a reward model reads it.

    Args:
        pair: the texts.
        chosen: token ids of the prompt with the chosen response.
        rejected: the same with the rejected one.
        group: number of the pair's first turn.
    """

    pair: Pair
    chosen: list[int]
    rejected: list[int]
    group: int

    @property
    def characters(self) -> int:
        """How much longer the chosen response is."""
        return len(self.pair.chosen) - len(self.pair.rejected)


def choose_template(settings: RewardModelSettings, tokenizer: Any, pairs: Sequence[Pair]) -> str:
    """Resolve the template `auto`.

    Raises:
        PromptError: if the template is `chat` and the tokenizer has none.
    """
    conversations = sum(is_conversation(pair.prompt) for pair in pairs)
    template = settings.template if settings.template != AUTO else "chat" if conversations else "concat"
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            f"{conversations} of {len(pairs)} prompts are conversations and template is {settings.template!r}, but the "
            "backbone's tokenizer has no chat template.",
            "set tokenizer.chat_template, choose a chat model as the backbone, or give the prompts as texts.",
        )
    return template


def encode_pairs(
    classifier: Any, tokenizer: Any, pairs: Sequence[Pair], template: str, max_length: int
) -> tuple[list[EncodedPair], int]:
    """Tokenize pairs as `RewardModel` does; those whose sides are then equal are left out with a warning.

    Args:
        classifier: that reads them.
        tokenizer: its tokenizer.
        pairs: at least one.
        template: `chat` or `concat`.
        max_length: the most tokens of a text; the oldest are cut off.

    Returns:
        The pairs, and how many texts were cut.

    Raises:
        TrainingError: if no pair is left.
        ObjectiveError: if the tokenizer does not fit the classifier.
        PromptError: if the chat template refuses a conversation.
    """
    name = type(classifier).__name__
    check_vocabulary(name, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    groups: dict[str, int] = {}
    texts = [
        fill_template(template, tokenizer, pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)
    ]
    rows = embedding_rows(classifier)
    ids = encode_texts(name, tokenizer, texts, template=template, max_length=max_length, embeddings=rows)
    whole = tokenizer(texts, add_special_tokens=template != "chat", verbose=False)["input_ids"]
    cut = sum(len(all_ids) > max_length for all_ids in whole)
    encoded = [
        EncodedPair(pair, chosen, rejected, groups.setdefault(_first_turn(pair), len(groups)))
        for pair, chosen, rejected in zip(pairs, ids[::2], ids[1::2], strict=True)
        if chosen != rejected
    ]
    if not encoded:
        raise TrainingError(
            f"all {len(pairs)} pairs have two sides of the same {max_length} last tokens or fewer.",
            "raise max_length, or use a tokenizer that knows the words of the responses.",
        )
    if len(encoded) < len(pairs):
        warn_user(f"{len(pairs) - len(encoded)} of {len(pairs)} pairs are left out: their sides have the same tokens.")
    return encoded, cut


def split_pairs(
    pairs: Sequence[EncodedPair], held_out: float, seed: int
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """Split pairs so that no first turn is on both sides.

    Args:
        pairs: at least one.
        held_out: share of the pairs to hold out.
        seed: of the choice.

    Returns:
        The training pairs and those held out.

    Raises:
        TrainingError: if too few are left on one side.
    """
    counts: dict[int, int] = {}
    for pair in pairs:
        counts[pair.group] = counts.get(pair.group, 0) + 1
    chosen: set[int] = set()
    held = 0
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    for group in (list(counts)[index] for index in order):
        if held >= held_out * len(pairs):
            break
        chosen.add(group)
        held += counts[group]
    if held < LEAST_HELD_OUT or held == len(pairs):
        raise TrainingError(
            f"held_out is {held_out}, which holds out {held} of {len(pairs)} pairs with {len(counts)} different first "
            f"turns, expected at least {LEAST_HELD_OUT} and others to train on.",
            "give more pairs with different prompts, or a larger held_out.",
        )
    return [pair for pair in pairs if pair.group not in chosen], [pair for pair in pairs if pair.group in chosen]


def digest_pairs(pairs: Sequence[EncodedPair]) -> str:
    """Return a hash over pairs."""
    content = json.dumps([[pair.chosen, pair.rejected, pair.group] for pair in pairs])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _first_turn(pair: Pair) -> str:
    """Return what a pair is grouped by: longer conversations that begin alike are no independent evidence."""
    if isinstance(pair.prompt, str):
        return pair.prompt
    return next((str(m["content"]) for m in pair.prompt if m["role"] == "user"), last_user_turn(pair.prompt))
