"""The texts that a reward model reads: how prompt and response are joined, and whether its tokenizer fits it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mavis.errors import ObjectiveError
from mavis.policies.chat import MARK, Prompt, as_conversation, is_conversation, render_messages
from mavis.policies.encoding import surplus_bos

_FIELD = re.compile(r"\{(prompt|response|bos|eos)\}")


def check_template(template: str) -> str:
    """Return a template if it is `chat`, `concat` or a text with `{response}`, else raise ObjectiveError."""
    if template in ("chat", "concat") or (isinstance(template, str) and "{response}" in template):
        return template
    raise ObjectiveError(
        f"template is {template!r}, but it must be 'auto', 'chat', 'concat' or a text with {{response}}.",
        "'{prompt}{response}' is concat, '{response}' reads the response alone, and {bos} and {eos} are tokens.",
    )


def fill_template(template: str, tokenizer: Any, prompt: Prompt, response: str) -> str:
    """Join a prompt and a response to the text that a reward model reads.

    Args:
        template: see `RewardModel`.
        tokenizer: of the reward model.
        prompt: a text, without any template, or a conversation.
        response: what the policy wrote.

    Returns:
        The text, without the special tokens that the tokenizer itself adds.

    Raises:
        ObjectiveError: if the template asks for a token that the tokenizer lacks, or cannot hold a conversation.
        PromptError: if the conversation cannot be used, or the chat template refuses it.
    """
    if template == "chat":
        return render_messages(tokenizer, _with_reply(prompt, response))
    if is_conversation(prompt):
        raise ObjectiveError(
            f"template is {template!r}, but a prompt is a conversation of {len(prompt)} messages.",
            "use template='chat', with a reward model whose tokenizer has a chat template.",
        )
    if template == "concat":
        return f"{prompt}{response}"
    fields = {"prompt": prompt, "response": response, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    for name in ("bos", "eos"):
        if fields[name] is None and f"{{{name}}}" in template:
            raise ObjectiveError(
                f"template is {template!r}, but the tokenizer of the reward model has no {name} token.",
                "write the separator that the model was trained with.",
            )
    # In one pass, so that braces in a prompt or a response are left alone.
    return _FIELD.sub(lambda field: str(fields[field[1]]), template)


def _with_reply(prompt: Prompt, response: str) -> list[dict[str, str]]:
    """Add the response to a conversation; it continues a last message of the assistant's."""
    if isinstance(prompt, str):  # any text, an empty one too
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    messages = as_conversation(prompt)
    if messages[-1]["role"] == "assistant":
        response = messages.pop()["content"] + response
    return [*messages, {"role": "assistant", "content": response}]


def split_unfinished(template: str, tokenizer: Any, prompt: Prompt, response: str) -> tuple[str, str]:
    """Split the text that a reward model reads into what precedes the response and the response.

    What a template writes after the response, such as the end of the turn, is left out, and so is what it strips from
    the response's ends.

    Args:
        template: see `RewardModel`.
        tokenizer: of the reward model.
        prompt: a text, without any template, or a conversation.
        response: what the policy wrote.

    Raises:
        ObjectiveError: if the response is not the last part of the text.
        PromptError: if the conversation cannot be used, or the chat template refuses it.
    """
    marker = f"{MARK}mavis{MARK}"
    full, marked = (fill_template(template, tokenizer, prompt, text) for text in (response, marker))
    before, found, after = marked.rpartition(marker)
    own = template not in ("chat", "concat")
    is_last = template.count("{response}") == 1 and "{prompt}" not in template.partition("{response}")[2]
    if not found or not full.startswith(before) or not full.endswith(after) or (own and not is_last):
        raise ObjectiveError(
            f"template is {template!r}, in which the response is not the last part, so that prefixes have no score.",
            "use a reward model that reads the prompt first.",
        )
    return before, full[len(before) : len(full) - len(after)]


def encode_texts(
    model: str, tokenizer: Any, texts: Sequence[str], *, template: str, max_length: int, embeddings: int
) -> list[list[int]]:
    """Tokenize the texts that a reward model reads, to at most `max_length` tokens and at least one.

    Args:
        model: its name, for errors.
        tokenizer: of the reward model; its truncation side says which end of an overlong text is cut.
        texts: of `fill_template`.
        template: that filled them; a chat template writes its own special tokens.
        max_length: the most tokens.
        embeddings: how many tokens the model has embeddings of.

    Raises:
        ObjectiveError: if a token has no embedding.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=template != "chat")[
        "input_ids"
    ]
    encoded = [ids[surplus_bos(tokenizer, ids) :] for ids in encoded]
    check_token_ids(model, tokenizer, encoded, embeddings)
    # A model cannot read an empty text; the token that begins or ends texts stands for it.
    empty = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return [list(ids) or [empty] for ids in encoded]


def check_vocabulary(model: str, tokenizer: Any) -> None:
    """Refuse a tokenizer without words: without its files, transformers makes one that reads everything as unknown.

    Raises:
        ObjectiveError: if it knows special and added tokens only.
    """
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        raise ObjectiveError(
            f"reward model {model!r} has a tokenizer that knows {len(vocabulary)} special tokens and no word.",
            "save the tokenizer that the model was trained with beside it: tokenizer.save_pretrained(folder).",
        )


def check_token_ids(model: str, tokenizer: Any, encoded: Sequence[Sequence[int]], embeddings: int) -> None:
    """Refuse token ids beyond the embedding of a reward model.

    Args:
        model: its name.
        tokenizer: of the reward model.
        encoded: the token ids of the texts.
        embeddings: how many tokens the model has embeddings of.

    Raises:
        ObjectiveError: if there is one; names the token.
    """
    largest = max((max(ids, default=0) for ids in encoded), default=0)
    if largest >= embeddings:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ObjectiveError(
            f"the tokenizer of reward model {model!r} writes token {largest} ({token!r}), but the model has embeddings "
            f"of {embeddings} tokens.",
            "use the tokenizer that the model was trained with; an added token needs model.resize_token_embeddings.",
        )
