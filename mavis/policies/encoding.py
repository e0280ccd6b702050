"""Token ids of prompts: rendered, with one BOS token, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding

from mavis.policies.chat import Prompt, is_conversation, render_prompt


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt], *, continue_final_message: bool = False) -> list[list[int]]:
    """Encode prompts, each by itself.

    A text gets the special tokens that the tokenizer adds, but no second BOS token if it begins with one. A
    conversation has those of the chat template.

    Args:
        tokenizer: of the policy.
        prompts: B texts or conversations.
        continue_final_message: see `render_prompt`.

    Returns:
        B lists of token ids.

    Raises:
        PromptError: see `render_prompt`.

    Examples:
        >>> import mavis
        >>> from mavis.policies import prompt_ids
        >>> _, tokenizer = mavis.embedded.load()
        >>> prompt_ids(tokenizer, ["Once"]) == prompt_ids(tokenizer, ["<s>Once"])
        True
    """
    prompts = list(prompts)  # which keeps them, and so their ids
    distinct = {id(prompt): prompt for prompt in prompts}  # rendered once, however many responses are drawn to it
    ids: dict[int, list[int]] = {}
    for as_chat in (False, True):
        chosen = {key: prompt for key, prompt in distinct.items() if is_conversation(prompt) is as_chat}
        if chosen:
            texts = [
                render_prompt(tokenizer, prompt, continue_final_message=continue_final_message)
                for prompt in chosen.values()
            ]
            encoded = tokenizer(texts, add_special_tokens=not as_chat)["input_ids"]
            ids |= {key: row[surplus_bos(tokenizer, row) :] for key, row in zip(chosen, encoded, strict=True)}
    return [list(ids[id(prompt)]) for prompt in prompts]


def surplus_bos(tokenizer: Any, ids: Sequence[int]) -> int:
    """Return how many token ids are to be dropped at the start: 1 for a text that had a BOS token and got a second."""
    bos = tokenizer.bos_token_id
    return int(bos is not None and list(ids[:2]) == [bos, bos])


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], *, continue_final_message: bool = False) -> Any:
    """Encode prompts as one batch, padded on the left; see `prompt_ids`.

    A tokenizer without a padding token will do.

    Returns:
        A `BatchEncoding` of input_ids (B, L) and attention_mask (B, L), both int64.

    Examples:
        >>> import mavis
        >>> from mavis.policies import encode_prompts
        >>> _, tokenizer = mavis.embedded.load()
        >>> encode_prompts(tokenizer, ["Once upon a time", "One"])["attention_mask"].tolist()
        [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    """
    ids = prompt_ids(tokenizer, prompts, continue_final_message=continue_final_message)
    if tokenizer.pad_token_id is None:  # padding is masked, so that any token will do
        padding = tokenizer.eos_token_id or 0
        longest = max(map(len, ids))
        rows = {
            "input_ids": [[padding] * (longest - len(row)) + row for row in ids],
            "attention_mask": [[0] * (longest - len(row)) + [1] * len(row) for row in ids],
        }
        return BatchEncoding(rows, tensor_type="pt")
    return tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")


def unpadded_ids(encoded: Any) -> list[list[int]]:
    """Return the token ids of each row of `encode_prompts` without padding."""
    rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
    return [row[is_token].tolist() for row, is_token in rows]


def response_texts(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """Decode responses in context: decoded alone, a response can lose its leading space.

    Args:
        tokenizer: of the policy.
        prompts: B lists of token ids.
        responses: B lists of token ids, each to the prompt at the same index.

    Returns:
        B texts, without special tokens.
    """
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    whole = tokenizer.batch_decode(
        [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], skip_special_tokens=True
    )
    alone = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [
        text[len(start) :] if text.startswith(start) else other
        for start, text, other in zip(before, whole, alone, strict=True)
    ]


def until_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """Return token ids up to and including the first end token; all of them if there is none."""
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids
