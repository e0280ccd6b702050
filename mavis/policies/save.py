"""A policy and its tokenizer as a Hugging Face folder, written whole."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis.utils.files import atomic_folder, read_json, write_json


def save_policy(folder: str | Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the policy and its tokenizer as one Hugging Face folder, whole."""
    with atomic_folder(folder) as temporary:
        policy.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # transformers notes how a tokenizer was loaded; a folder should not depend on where its tokenizer came from.
        settings = read_json(temporary / "tokenizer_config.json")
        kept = {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")}
        write_json(temporary / "tokenizer_config.json", kept)
