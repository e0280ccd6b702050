"""Bits per byte against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mavis.errors import EvaluationError
from recipes.embedded_policy.bits_per_byte import bits_per_byte

VOCABULARY = 7


class Words:
    """A tokenizer that gives every word a token, by its length; 0 is BOS."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = None
    unk_token_id: int | None = None

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[len(word) % (VOCABULARY - 1) + 1 for word in text.split()])


class Table(torch.nn.Module):
    """A policy that knows the last token only, and remembers how long its inputs were."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor, context: int = 512) -> None:
        super().__init__()
        self.logits, self.seen = logits, []
        self.config = SimpleNamespace(max_position_embeddings=context)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.seen.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.logits[input_ids])


TEXTS = ["one two three four five six", "Ünïcödé counts bytes", "", "x"]


def uniform(context: int = 512) -> Table:
    return Table(torch.zeros(VOCABULARY, VOCABULARY), context)


def test_a_uniform_policy_pays_log2_v_per_token() -> None:
    tokens = sum(len(text.split()) for text in TEXTS)
    expected = math.log2(VOCABULARY) * tokens / sum(len(text.encode()) for text in TEXTS)
    assert bits_per_byte(uniform(), Words(), TEXTS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("context", [2, 3, 4, 5, 64])
def test_windows_predict_every_token_once(context: int) -> None:
    # A policy that reads one token back predicts the same through any windows.
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    policy, text = Table(logits, context), " ".join("abcdefghij"[: k % 5 + 1] for k in range(23))
    ids = torch.tensor([0, *Words()(text).input_ids])
    nats = -logits.log_softmax(-1)[ids[:-1], ids[1:]].double().sum().item()
    assert bits_per_byte(policy, Words(), [text]) == pytest.approx(nats / len(text) / math.log(2), rel=1e-5)
    assert max(policy.seen) <= context


def test_texts_start_with_eos_if_there_is_no_bos() -> None:
    tokenizer = Words()
    tokenizer.bos_token_id, tokenizer.eos_token_id = None, 3
    assert bits_per_byte(uniform(), tokenizer, TEXTS) == bits_per_byte(uniform(), Words(), TEXTS)


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no byte"):
        bits_per_byte(uniform(), Words(), [""])
    with pytest.raises(EvaluationError, match="context is 1"):
        bits_per_byte(uniform(), Words(), TEXTS, context=1)
    tokenizer = Words()
    tokenizer.unk_token_id = 4
    with pytest.raises(EvaluationError, match="does not know"):
        bits_per_byte(uniform(), tokenizer, ["one two"])
    tokenizer.bos_token_id = None
    with pytest.raises(EvaluationError, match="neither BOS nor EOS"):
        bits_per_byte(uniform(), tokenizer, TEXTS)
