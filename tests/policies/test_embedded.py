"""The story LM that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.errors import PolicyError
from mavis.policies import embedded
from recipes.embedded_policy.bits_per_byte import bits_per_byte
from recipes.embedded_policy.corpus import read_stories, split_tail

SHARED = Path(__file__).resolve().parents[3] / "shared"
WEIGHTS = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return embedded.load()


def test_folder_is_small_and_has_no_pickles() -> None:
    files = [f for f in embedded.path().rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {file.name for file in files} >= WEIGHTS
    critic = [file for file in files if embedded.critic_path() in file.parents]
    assert sum(file.stat().st_size for file in files if file not in critic) <= 6_000_000
    assert sum(file.stat().st_size for file in critic) <= 1_500_000
    assert {file.suffix for file in files} <= {".py", ".json", ".safetensors", ".md", ".txt"}


def test_policy_is_frozen_float32_with_special_tokens(loaded: tuple[Any, Any]) -> None:
    policy, tokenizer = loaded
    assert not policy.training
    assert {(p.dtype, p.requires_grad) for p in policy.parameters()} == {(torch.float32, False)}
    assert policy.config.model_type == "llama"
    assert policy.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert policy.config.vocab_size == len(tokenizer)
    assert 1024 <= len(tokenizer) <= 4096
    assert policy.get_input_embeddings().weight is policy.get_output_embeddings().weight
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for name, value in special.items():
        assert getattr(tokenizer, name) == getattr(policy.config, name) == value
    # Nothing but these may differ from the defaults: what alters sampling alters β and the KL.
    assert policy.generation_config.to_diff_dict().keys() - {"transformers_version"} == special.keys()


def test_prompts_are_encoded_as_in_training(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    both = tokenizer(["Once upon a time", "Once upon a time, there was"], padding=True, return_tensors="pt")
    assert both.attention_mask[0].tolist() == [0] * 3 + [1] * (both.input_ids.shape[1] - 3)
    first = both.input_ids[0][3:]
    assert first[0] == tokenizer.bos_token_id
    assert torch.equal(both.input_ids[1][: len(first)], first)
    text = 'He said, "Zoë  has 3\nducks!" '
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_stories_end_and_consist_of_words(loaded: tuple[Any, Any]) -> None:
    policy, tokenizer = loaded
    torch.manual_seed(0)
    start = torch.full((16, 1), tokenizer.bos_token_id)
    out = policy.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=320)
    ended = (out == tokenizer.eos_token_id).any(dim=1)
    assert ended.float().mean() > 0.5
    assert not (out[:, 1:] == tokenizer.bos_token_id).any()
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert all(text[0].isupper() or text[0] in '"“' for text in texts)
    common = sum(word in {"the", "a", "and", "to", "was", "her", "she", "he"} for t in texts for word in t.split())
    assert 0.1 < common / sum(len(text.split()) for text in texts) < 0.4


def test_missing_weights_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "path", lambda: tmp_path)
    with pytest.raises(PolicyError, match="not in"):
        embedded.load()


def test_policy_predicts_as_well_as_its_teacher(loaded: tuple[Any, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    corpus, folder = SHARED / "data/tinystories/cased.txt", SHARED / "models/stories260K"
    if not (corpus.is_file() and folder.is_dir()):
        pytest.skip("needs TinyStories and stories260K in ../shared")
    heldout = split_tail(read_stories(corpus), 0.05)[1][:16]  # all of it: benchmarks/bench_policy.py
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = bits_per_byte(teacher, AutoTokenizer.from_pretrained(folder), heldout)
    assert bits_per_byte(*loaded, heldout) <= 1.05 * theirs
