"""Preference pairs: two responses to a prompt, of which one was preferred."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mavis.data.layouts import conversation_of
from mavis.data.rows import Rows, as_source, read_rows, report_unusable
from mavis.errors import DataError, PromptError
from mavis.policies.chat import Prompt, as_conversation, is_conversation

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, of which one was preferred.

    Args:
        prompt: that both responses answer, a text or a conversation.
        chosen: the preferred response, without the prompt.
        rejected: the other response.

    Examples:
        >>> from mavis.data import Pair
        >>> Pair("Once", " upon a time.", " more.").swapped().chosen
        ' more.'
    """

    prompt: Prompt
    chosen: str
    rejected: str

    def swapped(self) -> Pair:
        """Return the pair of somebody who prefers the other response."""
        return Pair(self.prompt, self.rejected, self.chosen)


def load_pairs(
    source: str | os.PathLike[str] | Sequence[dict[str, Any]],
    *,
    split: str | None = None,
    system: str | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Pair]:
    """Read preference pairs from any source that `load_prompts` reads.

    A row has `chosen` and `rejected`: texts with a text or a conversation as `prompt`; messages, which end with the
    reply and may leave out the turns before it if there is a `prompt`; or dialogues in the layout of HH-RLHF.

    Args:
        source: a list of rows; a `.csv`, `.json`, `.jsonl` or `.parquet` file; a folder written by `save_to_disk`; else
            the name of a dataset on a hub.
        split: of a dataset that has several; None takes `train`, or the only one.
        system: a message that is put before every conversation without one of its own.
        report: is called with one sentence that says what the rows were taken for.

    Returns:
        The pairs in their order. Rows whose sides are equal, share no prompt or repeat another than that of the row,
        that have an empty response, or whose conversation does not end with a turn of the user, are left out with a
        warning that counts them and names the first. A system message of the sides alone becomes one of the prompt.

    Raises:
        DataError: if the source is missing or unreadable, lacks a column, or no pair is left.

    Examples:
        >>> from mavis.data import load_pairs
        >>> asked = "\\n\\nHuman: Hi!\\n\\nAssistant:"
        >>> load_pairs([{"chosen": f"{asked} Hello.", "rejected": f"{asked} No."}])
        [Pair(prompt=[{'role': 'user', 'content': 'Hi!'}], chosen='Hello.', rejected='No.')]
    """
    rows = _rows_of_pairs(as_source(source), split)
    chosen, rejected = rows.column("chosen"), rows.column("rejected")
    prompts = rows.columns.get("prompt", [None] * len(rows))
    pairs: list[Pair] = []
    unusable: list[PromptError] = []
    for index, sides in enumerate(zip(prompts, chosen, rejected, strict=True)):
        try:
            pairs.append(_pair(*sides, f"row {index} of {rows.name}", system))
        except PromptError as error:
            unusable.append(error)
    report_unusable(unusable, bool(pairs), f"of {len(rows)} pairs")
    if not pairs:
        raise DataError(f"{rows.name} holds no pair.", "give at least one.")
    if report is not None:
        conversations = sum(is_conversation(pair.prompt) for pair in pairs)
        report(f"{len(pairs)} pairs from {rows.name}, {conversations} of them with a conversation as the prompt")
    return pairs


def _rows_of_pairs(source: str | Sequence[dict[str, Any]], split: str | None) -> Rows:
    if isinstance(source, str):
        return read_rows(source, split)
    for index, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {index} of the list is {row!r:.60}, expected a dictionary.",
                "write {'prompt': ..., 'chosen': ..., 'rejected': ...}.",
            )
    names = ["chosen", "rejected", *(["prompt"] if any("prompt" in row for row in source) else [])]
    return Rows("the list", {name: [row.get(name) for row in source] for name in names})


def _pair(prompt: Any, chosen: Any, rejected: Any, name: str, system: str | None) -> Pair:
    """Build the pair of one row.

    Raises:
        PromptError: if it is not a usable pair.
    """
    asked, replies = _split(prompt, (chosen, rejected), name)
    for side, reply in zip(_SIDES, replies, strict=True):
        if not reply.strip():
            raise PromptError(f"{name} has an empty {side} response.", "drop the row.")
    if replies[0] == replies[1]:
        raise PromptError(f"{name} has two equal responses.", "drop the row.")
    if is_conversation(asked):
        asked = as_conversation(asked, system=system)
        if asked[-1]["role"] != "user":
            raise PromptError(f"{name} has a prompt that does not end with a turn of the user.", "drop the row.")
    return Pair(asked, *replies)


def _split(prompt: Any, sides: tuple[Any, Any], name: str) -> tuple[Prompt, tuple[str, str]]:
    """Split a row into its prompt and the two responses."""
    first, second = (conversation_of(side, f"{name}, {which}") for side, which in zip(sides, _SIDES, strict=True))
    if prompt is not None:
        asked = conversation_of(prompt, f"{name}, prompt") or prompt
        if not isinstance(asked, str | list) or not (asked.strip() if isinstance(asked, str) else asked):
            raise PromptError(f"{name} has the prompt {prompt!r:.60}, expected a text or a conversation.", "drop it.")
        replies = _reply(sides[0], first, name), _reply(sides[1], second, name)
        return _with_system_of(asked, [(turns or [])[:-1] for turns in (first, second)], name), replies
    if first is None or second is None:
        raise PromptError(f"{name} has no prompt, and its sides are not conversations.", "add a column prompt.")
    if first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
        raise PromptError(f"{name} does not end with replies of the assistant.", "drop the row.")
    if first[:-1] != second[:-1] or len(first) < 2:
        raise PromptError(f"{name} has two sides that share no prompt.", "drop the row.")
    return first[:-1], (first[-1]["content"], second[-1]["content"])


def _reply(side: Any, conversation: list[dict[str, str]] | None, name: str) -> str:
    """Return the response of one side of a row that has a prompt."""
    if isinstance(side, str) and conversation is None:
        return side
    if conversation is None or conversation[-1]["role"] != "assistant":
        raise PromptError(f"{name} has {side!r:.60}, expected a text or a reply of the assistant.", "drop the row.")
    return conversation[-1]["content"]


def _with_system_of(asked: Prompt, repeated: Sequence[list[dict[str, str]]], name: str) -> Prompt:
    """Return a row's prompt with the system message that its sides have.

    Args:
        asked: the prompt.
        repeated: the turns before each side's reply, none if it is the reply alone.
        name: of the row.

    Raises:
        PromptError: if they say something else than the prompt.
    """
    systems: set[str] = set()
    for turns in (as_conversation(asked), *repeated):
        if turns and _turns(turns) != _turns(as_conversation(asked)):
            raise PromptError(f"{name} has sides that repeat another prompt than its own.", "drop the row.")
        systems |= {message["content"].strip() for message in turns if message["role"] == "system"}
    if len(systems) > 1:
        raise PromptError(f"{name} has {len(systems)} different system messages.", "drop the row.")
    return as_conversation(asked, system=systems.pop()) if systems else asked


def _turns(conversation: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return the turns after the system message, without surrounding white space."""
    return [(message["role"], message["content"].strip()) for message in conversation if message["role"] != "system"]
