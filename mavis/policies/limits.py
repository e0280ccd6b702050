"""What a causal LM can read: which token ids, and how many positions; checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mavis.errors import ConfigError, DecodingError, PolicyError
from mavis.policies.chat import Prompt
from mavis.policies.encoding import prompt_ids

_RESIZE = "use the policy's own tokenizer, or give added tokens embeddings: policy.resize_token_embeddings(...)."


def embedding_rows(policy: Any) -> int:
    """Return how many tokens a model has input embeddings of; fewer or more than its output vocabulary in some."""
    embedding = policy.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)  # quantised and sharded weights have other shapes
    return rows if isinstance(rows, int) else int(embedding.weight.shape[0])


def learnt_positions(model: Any) -> int | None:
    """Return the size of a model's table of positions, beyond which it cannot read; None if it has no such table."""
    config, embedding = model.config, model.get_input_embeddings()
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "max_position_embeddings", None)
    if not size:
        return None
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not embedding]
    if any(size <= table.num_embeddings <= size + 2 for table in tables):  # the first two of OPT's are for padding
        return int(size)
    # GPT-J and its relatives compute a table of sines in advance.
    sines = (len(table) for name, table in model.named_buffers() if name.rpartition(".")[2] == "embed_positions")
    return int(size) if size in sines else None


def check_prompts_fit(
    policy: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    critic_positions: int | None = None,
    *,
    continue_final_message: bool = False,
) -> None:
    """Check that a policy can read all prompts with responses to them, and what its tokenizer pads with.

    Args:
        policy: a causal LM.
        tokenizer: its tokenizer.
        prompts: at least one.
        max_new_tokens: the longest response.
        critic_positions: how many positions a critic can read; None for any number.
        continue_final_message: see `render_prompt`.

    Raises:
        PolicyError: if the tokenizer writes a token that the policy has no embedding of.
        ConfigError: if the longest prompt and response do not fit into a table of positions.
    """
    encoded = prompt_ids(tokenizer, prompts, continue_final_message=continue_final_message)
    rows = embedding_rows(policy)
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        raise PolicyError(
            f"the tokenizer pads with token {pad} ({tokenizer.pad_token!r}), but the policy has embeddings of {rows} "
            "tokens.",
            "pad with the end token: tokenizer.pad_token = tokenizer.eos_token.",
        )
    largest = max((max(ids, default=0) for ids in encoded), default=0)
    if largest >= rows:
        raise PolicyError(
            f"the tokenizer writes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the policy has "
            f"embeddings of {rows} tokens.",
            _RESIZE,
        )
    longest = max(map(len, encoded), default=0)
    for positions, whose in ((learnt_positions(policy), "policy"), (critic_positions, "critic's value model")):
        if positions is not None and longest + max_new_tokens > positions:
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens} and the longest prompt has {longest} tokens, but the {whose} has "
                f"learnt {positions} positions.",
                "sample shorter responses, or leave out the longest prompts.",
            )


def check_inputs_fit(
    policy: Any,
    ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int | None,
    padding_id: int | None,
    critic_positions: int | None = None,
) -> None:
    """Check that a policy can read token ids and a response to them.

    Args:
        policy: a causal LM.
        ids: (B, L) integer.
        mask: (B, L) attention mask, or None.
        max_new_tokens: the longest response; None if it is unknown.
        padding_id: what follows responses that end before others; None if nothing does.
        critic_positions: how many positions a critic can read; None for any number.

    Raises:
        DecodingError: if the policy has no embedding of a token, or the response does not fit into a table of
            positions.
    """
    rows = embedding_rows(policy)
    least, largest = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
    if least < 0 or largest >= rows:
        raise DecodingError(
            f"inputs has token id {least if least < 0 else largest}, but the policy has embeddings of {rows} tokens.",
            f"if it is the padding, tokenizer.pad_token = tokenizer.eos_token; otherwise {_RESIZE}",
        )
    if padding_id is not None and not 0 <= padding_id < rows:
        raise DecodingError(
            f"pad_token_id of the policy's generation_config is {padding_id}, but the policy has embeddings of {rows} "
            "tokens.",
            "pass pad_token_id=tokenizer.eos_token_id.",
        )
    if max_new_tokens is None:
        return
    tokens = mask if mask is not None and mask.dim() == 2 else None
    for positions, whose, unread in (
        (learnt_positions(policy), "policy", 1),  # nothing is generated after the last token
        (critic_positions, "critic's value model", 0),
    ):
        if positions is None or ids.shape[1] + max_new_tokens - unread <= positions:
            continue
        longest = ids.shape[1] if tokens is None else int(tokens.sum(dim=1).max())
        if longest + max_new_tokens - unread > positions:
            raise DecodingError(
                f"max_new_tokens is {max_new_tokens} and the longest prompt has {longest} tokens, but the {whose} has "
                f"learnt {positions} positions.",
                f"pass max_new_tokens={max(1, positions - longest)} or less, or shorten the prompts.",
            )
