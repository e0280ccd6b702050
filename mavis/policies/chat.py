"""Conversations: what a prompt is, and how the tokenizer's chat template renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mavis.errors import PromptError, warn_user
from mavis.policies.generation_config import end_token_ids

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "..."}`."""

Conversation = Sequence[Message]
"""Turns in their order; the last is usually the user's."""

Prompt = str | Conversation
"""What a response continues or answers: a text, or a conversation that the chat template renders."""

ROLES = ("system", "user", "assistant")

MARK = "\u2063"
"""An invisible separator, which marks a place in what a template writes."""


def is_conversation(prompt: Prompt) -> bool:
    """Whether a prompt is a conversation, not a text."""
    return not isinstance(prompt, str)


def as_conversation(prompt: Prompt, *, system: str | None = None) -> list[dict[str, str]]:
    """Turn a prompt into a conversation of plain messages.

    Args:
        prompt: a text, which becomes one turn of the user, or a conversation.
        system: a system message that is put before a conversation without one; None adds nothing.

    Returns:
        The messages, each with `role` and `content`.

    Raises:
        PromptError: see `check_conversation`.

    Examples:
        >>> from mavis.policies import as_conversation
        >>> as_conversation("Hi!", system="Be brief.")
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi!'}]
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_conversation(prompt)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def check_conversation(conversation: Conversation, *, name: str = "prompt") -> list[dict[str, str]]:
    """Check a conversation and return it as plain messages.

    Args:
        conversation: messages with `role` and `content`; content is a text, or parts that are all texts.
        name: of the conversation in an error.

    Returns:
        The messages, each with `role` and `content` alone; parts of text are joined.

    Raises:
        PromptError: if there is no message, one has an unknown role, no text or other content than text, or a
            system message is not the first.
    """
    if not isinstance(conversation, Sequence) or not conversation:
        raise PromptError(
            f"{name} is {conversation!r}, expected a text or a list of messages.",
            'write a conversation as [{"role": "user", "content": "Hello!"}].',
        )
    messages = [_plain_message(message, f"{name}, message {index}") for index, message in enumerate(conversation)]
    for index, message in enumerate(messages):
        if message["role"] == "system" and index:
            raise PromptError(
                f"{name} has a system message at position {index}, expected it first.", "move it to the front."
            )
    return messages


def last_user_turn(prompt: Prompt) -> str:
    """Return what the user said last; of a prompt that is a text, the text.

    Examples:
        >>> from mavis.policies import last_user_turn
        >>> last_user_turn([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."},
        ...     {"role": "user", "content": "Who are you?"}])
        'Who are you?'
    """
    if isinstance(prompt, str):
        return prompt
    return next((str(message["content"]) for message in reversed(prompt) if message["role"] == "user"), "")


def prompt_key(prompt: Prompt) -> str:
    """Return a text that equals that of another prompt only if the two are equal; for sets and dictionaries."""
    return prompt if isinstance(prompt, str) else "\0" + json.dumps([[m["role"], m["content"]] for m in prompt])


def render_prompt(tokenizer: Any, prompt: Prompt, *, continue_final_message: bool = False) -> str:
    """Render a prompt as the text that the policy continues.

    A text stays as it is. A conversation goes through the tokenizer's chat template, which then opens the assistant's
    turn.

    Args:
        tokenizer: of the policy.
        prompt: a text or a conversation.
        continue_final_message: let the policy continue a last message of the assistant's instead of refusing it.

    Returns:
        The text, with the special tokens that the template writes.

    Raises:
        PromptError: if the conversation cannot be used, the tokenizer has no chat template, or the template refuses or
            drops one of the messages.

    Examples:
        >>> import mavis
        >>> from mavis.policies import render_prompt
        >>> _, tokenizer = mavis.embedded.load()
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant: "
        >>> render_prompt(tokenizer, [{"role": "user", "content": "Hi!"}])
        'user: Hi!\\nassistant: '
    """
    if isinstance(prompt, str):
        return prompt
    messages = check_conversation(prompt)
    continues = messages[-1]["role"] == "assistant"
    if messages[-1]["role"] == "system":
        raise PromptError("prompt ends with the system message, expected a turn of the user.", "add one.")
    if continues and not continue_final_message:
        raise PromptError(
            f"prompt ends with the assistant's {_short(messages[-1]['content'])}, expected a turn of the user.",
            "drop that message, or pass continue_final_message=True to have it continued.",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "prompt is a conversation, but the policy's tokenizer has no chat template.",
            "set tokenizer.chat_template, choose a chat model, or pass the prompt as a text.",
        )
    # Some templates leave system messages out without a word. A template may trim or escape what a message says, so
    # marks are looked for instead.
    marks = [f"{MARK}{index}{MARK}" for index in range(len(messages))]
    marked = render_messages(
        tokenizer,
        [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)],
        opens_turn=not continues,
        continues=continues,
    )
    for message, mark in zip(messages, marks, strict=True):
        if mark not in marked:
            raise PromptError(
                f"the tokenizer's chat template drops the {message['role']} message {_short(message['content'])}.",
                "put its text into the user's first turn.",
            )
    return render_messages(tokenizer, messages, opens_turn=not continues, continues=continues)


def render_messages(
    tokenizer: Any, messages: Sequence[Message], *, opens_turn: bool = False, continues: bool = False
) -> str:
    """Render messages by the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        messages: in their order.
        opens_turn: open a turn of the assistant's at the end.
        continues: leave the last message open.

    Raises:
        PromptError: if the template refuses them.
    """
    from jinja2 import TemplateError

    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opens_turn, continue_final_message=continues
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise PromptError(
            f"the tokenizer's chat template refuses a conversation of {roles}: {error}",
            "many templates want user and assistant in turn, and some no system message.",
        ) from error
    return rendered


def turn_end_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the special tokens that end the assistant's turn in the tokenizer's chat template.

    A chat model whose generation config names only the end of a text would go on after its turn.

    Args:
        tokenizer: of the policy.

    Returns:
        One id, or none if the template writes no special token after the assistant's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return set()
    marker = f"{MARK}mavis{MARK}"
    try:
        rendered = render_messages(
            tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": marker}]
        )
    except PromptError:
        return set()
    if marker not in rendered:
        return set()
    after = tokenizer(rendered.rsplit(marker, 1)[1].lstrip(), add_special_tokens=False)["input_ids"][:1]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return set(after) & (special | set(tokenizer.all_special_ids))


def warn_unsuitable(policy: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Warn where prompts do not suit a policy: bare texts for a chat model, or turns that it would not end.

    Args:
        policy: a causal LM.
        tokenizer: its tokenizer.
        prompts: texts or conversations.
    """
    turn_ends = turn_end_ids(tokenizer)
    if not any(map(is_conversation, prompts)):
        if turn_ends:
            warn_user(
                "prompts are texts, but the policy is a chat model: it continues them instead of answering. Pass "
                "conversations, or set chat=true, to have its chat template rendered."
            )
    elif not turn_ends & end_token_ids(policy) and turn_ends:
        warn_user(
            "policy.generation_config.eos_token_id lacks the token that ends a turn in the tokenizer's chat template, "
            f"{sorted(turn_ends)}, so responses go on after their turn. Add it, or load by mavis.policies.load_policy."
        )


def _plain_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(
            f"{name} is {_short(message)}, expected a role and a content.",
            'write {"role": "user", "content": "Hello!"}.',
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise PromptError(f"{name} has role {role!r}, expected {', '.join(ROLES)}.", "rename or drop it.")
    if isinstance(content, Sequence) and not isinstance(content, str):
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds != {"text"}:
            raise PromptError(
                f"{name} has content of type {', '.join(map(str, sorted(kinds - {'text'}, key=str)))}, expected text.",
                "policies read text alone; drop images and the like.",
            )
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise PromptError(f"{name} has content {content!r}, expected text.", "drop empty messages.")
    return {"role": role, "content": content}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
