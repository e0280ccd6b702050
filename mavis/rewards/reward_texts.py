"""The texts that a reward model reads: how prompt and response are joined, and whether its tokenizer fits it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mavis.errors import ObjectiveError

_FIELD = re.compile(r"\{(prompt|response|bos|eos)\}")


def check_template(template: str) -> str:
    """Return a template if it is `chat`, `concat` or a text with `{response}`, else raise ObjectiveError."""
    if template in ("chat", "concat") or (isinstance(template, str) and "{response}" in template):
        return template
    raise ObjectiveError(
        f"template is {template!r}, but it must be 'chat', 'concat' or a text with {{response}}.",
        "'{prompt}{response}' is concat, '{response}' reads the response alone, and {bos} and {eos} are tokens.",
    )


def fill_template(template: str, tokenizer: Any, prompt: str, response: str) -> str:
    """Join a prompt and a response to the text that a reward model reads.

    Args:
        template: see `RewardModel`.
        tokenizer: of the reward model.
        prompt: without any template.
        response: what the policy wrote.

    Returns:
        The text, without the special tokens that the tokenizer itself adds.

    Raises:
        ObjectiveError: if the template asks for a token that the tokenizer lacks.
    """
    if template == "concat":
        return prompt + response
    if template == "chat":
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    fields = {"prompt": prompt, "response": response, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    for name in ("bos", "eos"):
        if fields[name] is None and f"{{{name}}}" in template:
            raise ObjectiveError(
                f"template is {template!r}, but the tokenizer of the reward model has no {name} token.",
                "write the separator that the model was trained with.",
            )
    # In one pass, so that braces in a prompt or a response are left alone.
    return _FIELD.sub(lambda field: str(fields[field[1]]), template)


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
