"""Saving a policy and its tokenizer as a Hugging Face folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mavis.utils.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_policy(folder: str | os.PathLike[str], policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a policy and its tokenizer to one Hugging Face folder, completely or not at all.

    Args:
        folder: the target; an existing folder is replaced.
        policy: a causal LM.
        tokenizer: its tokenizer.

    Examples:
        >>> from pathlib import Path
        >>> from mavis.policies import embedded, save_policy
        >>> save_policy("policy", *embedded.load())
        >>> sorted(file.name for file in Path("policy").glob("*.safetensors"))
        ['model.safetensors']
    """
    with atomic_folder(folder) as temporary:
        policy.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # transformers records how a tokenizer was loaded, which would make the folder depend on where it came from.
        settings = read_json(temporary / "tokenizer_config.json", strict=False)
        kept = {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")}
        write_json(temporary / "tokenizer_config.json", kept)
