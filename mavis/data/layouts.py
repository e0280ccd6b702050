"""The layouts in which rows hold conversations: messages, and dialogues of "Human:" and "Assistant:"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mavis.errors import PromptError
from mavis.policies.chat import check_conversation

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Whether a text is a dialogue of "Human:" and "Assistant:", each after an empty line."""
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def parse_dialogue(text: str, name: str = "the dialogue") -> list[dict[str, str]]:
    """Parse a dialogue as HH-RLHF writes it into messages.

    Args:
        text: "\\n\\nHuman: ... \\n\\nAssistant: ..." and so on.
        name: of the row, for errors.

    Returns:
        The messages, without surrounding white space. An open turn of the assistant's at the end is left out: it is
        what a policy is asked to write. A role that speaks twice in a row speaks once, in two paragraphs.

    Raises:
        PromptError: if a turn is empty.

    Examples:
        >>> from mavis.data.layouts import parse_dialogue
        >>> parse_dialogue("\\n\\nHuman: Hi!\\n\\nAssistant:")
        [{'role': 'user', 'content': 'Hi!'}]
    """
    parts = _TURN.split(text)
    turns = [(_ROLES[name], content.strip()) for name, content in zip(parts[1::2], parts[2::2], strict=True)]
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    messages: list[dict[str, str]] = []
    for index, (role, content) in enumerate(turns):
        if not content:
            raise PromptError(f"turn {index} of {name} is empty.", "drop the row.")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


def conversation_of(value: Any, name: str) -> list[dict[str, str]] | None:
    """Return the conversation that a row's value is, or None if it is none.

    Args:
        value: messages, the same as a mapping of columns, or a dialogue of "Human:" and "Assistant:".
        name: of the row, for errors.

    Raises:
        PromptError: if it is a conversation that cannot be used.
    """
    if isinstance(value, str):
        return check_conversation(parse_dialogue(value, name), name=name) if is_dialogue(value) else None
    if isinstance(value, Mapping) and {"role", "content"} <= set(value):  # how a table may hold a list of messages
        columns = value["role"], value["content"]
        if isinstance(columns[0], str) or isinstance(columns[1], str) or len(columns[0]) != len(columns[1]):
            raise PromptError(f"{name} is a single message, expected a list of messages.", "wrap it in a list.")
        value = [{"role": role, "content": content} for role, content in zip(*columns, strict=True)]
    return check_conversation(value, name=name) if isinstance(value, Sequence) else None


def without_reply(conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a conversation without the assistant's turn at its end, if it has one."""
    return conversation[:-1] if conversation[-1]["role"] == "assistant" else conversation
