"""Tiny sequence classifiers in folders, built from nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.factories import llama_config

WORDS = ["<pad>", "<unk>", "<eos>", "user", "assistant", ":", *"abcdefghij"]

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A function that writes a random classifier and a tokenizer of letters, and gives their folder."""

    def make(
        kind: str = "llama",
        *,
        labels: int = 1,
        pad_token: str | None = "<pad>",
        chat_template: str | None = None,
        begins_with_eos: bool = False,
        bos_token: str | None = None,
        name: str = "classifier",
    ) -> Path:
        folder = tmp_path / name
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if begins_with_eos:
            backend.post_processor = processors.TemplateProcessing(
                single="<eos> $A", special_tokens=[("<eos>", WORDS.index("<eos>"))]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token=pad_token
        )
        if bos_token is not None:
            tokenizer.bos_token = bos_token
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
        sizes: dict[str, Any] = {
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "num_labels": labels,
            "initializer_range": 0.5,  # wide, so that different texts get clearly different logits
            "pad_token_id": None if pad_token is None else WORDS.index(pad_token),
            "bos_token_id": None,
            "eos_token_id": WORDS.index("<eos>"),
        }
        torch.manual_seed(0)
        if kind == "llama":
            model = LlamaForSequenceClassification(llama_config(**sizes))
        else:
            model = BertForSequenceClassification(BertConfig(**sizes | {"pad_token_id": 0}))
        model.save_pretrained(folder)
        return folder

    return make
