"""Prompts, texts or conversations, from any source."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from mavis.data.layouts import conversation_of, without_reply
from mavis.data.rows import Rows, as_source, read_rows, report_unusable
from mavis.errors import DataError, PromptError, check_whole
from mavis.policies.chat import Prompt, as_conversation, is_conversation, prompt_key

Chat = Literal["auto"] | bool

# Columns that hold prompts, by the names that the field uses; of the last two only what precedes the reply.
_COLUMNS = ("prompt", "messages", "chosen")
_WITH_REPLY = ("messages", "chosen", "rejected")


def load_prompts(
    source: str | os.PathLike[str] | Sequence[Prompt],
    *,
    column: str | None = None,
    split: str | None = None,
    chat: Chat = "auto",
    system: str | None = None,
    first_words: int | None = None,
    limit: int | None = None,
    repeated: bool = False,
    report: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """Read prompts from any source that the `datasets` library knows.

    A row is a text, a conversation of messages (`{"role", "content"}`), or a dialogue in the layout of HH-RLHF, which
    is read as a conversation. Of a column `messages`, and of `chosen` where there is no prompt, the last turn is left
    out if it is the assistant's: it is the reply.

    Args:
        source: prompts as a list; `-` for standard input or a `.txt` file, one prompt a line; a `.csv`, `.json`,
            `.jsonl` or `.parquet` file; a folder written by `save_to_disk`; else the name of a dataset on a hub.
        column: the column that holds the prompts; None takes `prompt`, `messages` or `chosen`, else the only column of
            text.
        split: of a dataset that has several; None takes `train`, or the only one.
        chat: whether prompts are conversations: True makes each text one turn of the user, False reads texts alone, and
            `auto` reads conversations where the source holds any.
        system: a message that is put before every conversation without one of its own.
        first_words: keep only this many words of each text, ≥ 1, for corpora of whole texts; None keeps all.
        limit: keep only this many prompts, ≥ 1; None keeps all.
        repeated: whether duplicates are kept.
        report: is called with one sentence that says what the rows were taken for.

    Returns:
        Prompts in their order, without empty ones and, unless `repeated`, without duplicates: all texts, or all
        conversations. Conversations that cannot be used are left out of a source with a warning that counts them.

    Raises:
        DataError: if the source is missing or unreadable, a column or split is unknown, a row is neither text nor
            conversation, a number is out of range, or no prompt is left.
        PromptError: if no conversation can be used, or one of a list cannot.

    Examples:
        >>> from mavis.data import load_prompts
        >>> load_prompts(["Once upon a time", "", "The dog ran", "The dog ran"], first_words=2)
        ['Once upon', 'The dog']
        >>> load_prompts(["Hi!"], chat=True, system="Be brief.")
        [[{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi!'}]]
    """
    given = {name: value for name, value in (("first_words", first_words), ("limit", limit)) if value is not None}
    check_whole(DataError, "leave it out to keep everything.", **given)
    origin = as_source(source)
    rows = read_rows(origin, split)
    name = _column(rows, column)
    found = _parse(rows, name, chat, strict=not isinstance(origin, str))
    as_chat = chat is True or any(map(is_conversation, found))
    if as_chat and first_words is not None:
        raise DataError(f"first_words is {first_words}, but the prompts are conversations.", "leave first_words out.")
    if system is not None and not as_chat:
        raise DataError(f"system is {system!r}, but the prompts are texts.", "chat=true makes each a user's turn.")
    if as_chat:
        prompts: list[Prompt] = [as_conversation(prompt, system=system) for prompt in found]
    elif first_words is not None:
        prompts = [" ".join(str(text).split()[:first_words]) for text in found]
    else:
        prompts = found
    if not repeated:
        unique: dict[str, Prompt] = {}
        for prompt in prompts:
            unique.setdefault(prompt_key(prompt), prompt)
        prompts = list(unique.values())
    if not prompts:
        shown = "an empty list" if not isinstance(origin, str) else rows.name
        raise DataError(f"prompts come from {shown}, which holds no prompt.", "give at least one line of text.")
    if report is not None:
        texts = sum(not is_conversation(prompt) for prompt in found)
        report(_describe(rows, name, len(prompts[:limit]), as_chat, texts if as_chat else 0))
    return prompts[:limit]


def draw_prompts(prompts: Sequence[Prompt], rows: int, seed: int) -> list[Prompt]:
    """Draw prompts in random order, each as often as any other or once more.

    Args:
        prompts: at least one.
        rows: how many to draw, ≥ 1.
        seed: of the random orders; each pass over the prompts has its own.

    Returns:
        `rows` prompts.

    Examples:
        >>> from mavis.data import draw_prompts
        >>> sorted(draw_prompts(["a", "b"], 4, seed=0))
        ['a', 'a', 'b', 'b']
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Prompt] = []
    while len(drawn) < rows:
        drawn.extend(prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist())
    return drawn[:rows]


def _column(rows: Rows, column: str | None) -> str:
    """Choose the column that holds the prompts."""
    if list(rows.columns) == [""]:
        if column is not None:
            raise DataError(f"column is {column!r}, but {rows.name} has no columns.", "leave column out.")
        return ""
    if column is not None:
        rows.column(column)  # which refuses one that is not there
        return column
    known = next((name for name in _COLUMNS if name in rows.columns), None)
    if known is not None:
        return known
    texts = rows.texts()
    if len(texts) != 1:
        raise DataError(
            f"{rows.name} has {len(texts)} columns of text: {', '.join(texts)}.",
            f"name the column of the prompts; there are: {', '.join(rows.columns)}.",
        )
    return texts[0]


def _parse(rows: Rows, column: str, chat: Chat, *, strict: bool) -> list[Prompt]:
    """Return the prompts of a column; unusable conversations raise if `strict`, else they are counted in a warning."""
    prompts: list[Prompt] = []
    unusable: list[PromptError] = []
    for index, value in enumerate(rows.columns[column]):
        name = f"row {index} of {rows.name}" + (f", column {column!r}" if column else "")
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        try:
            conversation = _conversation(value, name, column, chat)
        except PromptError as error:
            if strict:
                raise
            unusable.append(error)
            continue
        if conversation is None and not isinstance(value, str):
            raise DataError(f"{name} is {value!r:.60}, expected a text or a conversation.", "name another column.")
        prompts.append(value if conversation is None else conversation)
    report_unusable(unusable, bool(prompts), f"of {len(rows)} rows")
    return prompts


def _conversation(value: Any, name: str, column: str, chat: Chat) -> list[dict[str, str]] | None:
    """Return the conversation that a row asks to be answered; None if it is a text."""
    if isinstance(value, str) and chat is False:
        return None
    conversation = conversation_of(value, name)
    if conversation is None and isinstance(value, str) and column in _WITH_REPLY:
        raise DataError(
            f"{name} is a text without turns, so its reply cannot be told from its prompt.", "name a column."
        )
    if conversation is None:
        return None
    if chat is False:
        raise DataError(f"chat is False, but {name} is a conversation.", "use chat=auto, or a column of text.")
    if column in _WITH_REPLY or isinstance(value, str):
        conversation = without_reply(conversation)
    if not conversation or conversation[-1]["role"] != "user":
        raise PromptError(f"{name} does not end with a turn of the user.", "drop what comes after it.")
    return conversation


def _describe(rows: Rows, column: str, count: int, as_chat: bool, texts: int) -> str:
    kind = "conversations" if as_chat else "texts"
    where = f" in column {column!r}" if column else ""
    left_out = " without the replies" if column in _WITH_REPLY else ""
    turned = f", {texts} of them a single turn of the user" if texts else ""
    return f"{count} prompts from {rows.name}: {kind}{where}{left_out}{turned}"
