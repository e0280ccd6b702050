"""What a trunk is made from: plain weights, the policy's tokens, and vocabularies padded to other sizes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import mavis
from mavis.errors import CriticError
from tests.factories import Dequantisable, Opaque, tiny_llama, with_weights_of


def words(count: int, first: int = 0) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"t{i}": first + i for i in range(count)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0")


def llama(vocabulary: int, seed: int = 0) -> Any:
    return tiny_llama(seed, vocab_size=vocabulary, num_hidden_layers=1)


def saved(folder: Path, vocabulary: int, tokenizer: Any) -> Path:
    llama(vocabulary, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def built(policy: Any, backbone: Any, tokenizer: Any, readout: Any = "token") -> Any:
    return mavis.ValueModelCritic.for_policy(policy, ["a"], backbone=backbone, tokenizer=tokenizer, readout=readout)


class TestVocabularies:
    @pytest.mark.parametrize("readout", ["token", "candidates"])
    @pytest.mark.parametrize("rows", [30, 33, 36, 40])
    def test_the_same_tokenizer_padded_to_any_size_is_accepted(self, rows: int, readout: Any, tmp_path: Path) -> None:
        policy, tokenizer = llama(36), words(30)
        critic = built(policy, saved(tmp_path / "backbone", rows, tokenizer), tokenizer, readout)
        with torch.no_grad():
            critic.heads.outer.normal_()
        expected, found = llama(rows, seed=1).model.embed_tokens.weight, critic.trunk.get_input_embeddings().weight
        assert torch.equal(found[:rows], expected)
        assert len(found) == max(rows, 36)
        if rows < 36:
            assert torch.allclose(found[rows:], expected.mean(dim=0).expand(36 - rows, -1))
        # Every token of the policy is a candidate, those that pad its vocabulary included.
        inputs = torch.tensor([[5, 7, 9]])
        arguments: dict[str, Any] = {"weights": [1.0], "beta": 0.5, "top_k": None, "max_new_tokens": 3}
        mavis.generate(policy, inputs, critic=critic, do_sample=False, **arguments)
        critic.save_pretrained(tmp_path / "critic")
        loaded = mavis.Critic.from_pretrained(tmp_path / "critic")
        one, other = (mavis.generate(policy, inputs, critic=c, do_sample=False, **arguments) for c in (critic, loaded))
        assert torch.equal(one, other)

    def test_a_backbone_with_more_tokens_than_the_policy_is_accepted(self, tmp_path: Path) -> None:
        built(llama(36), saved(tmp_path / "backbone", 36, words(34)), words(30))

    @pytest.mark.parametrize(
        ("tokenizer", "message"),
        [(words(28), "token 't28' is missing, not 28"), (words(30, first=1), "token 't0' is 1, not 0")],
    )
    def test_a_token_that_means_another_word_is_named(self, tokenizer: Any, message: str, tmp_path: Path) -> None:
        backbone = saved(tmp_path / "backbone", 36, tokenizer)
        with pytest.raises(CriticError, match=f"another vocabulary than the policy's tokenizer: {message}"):
            built(llama(36), backbone, words(30))

    def test_too_few_embeddings_for_the_tokens_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CriticError, match="backbone knows 29 tokens, but the policy writes 36"):
            built(llama(36), saved(tmp_path / "backbone", 29, words(30)), words(30))


def with_adapter(way: str) -> Any:
    peft = pytest.importorskip("peft")
    policy, config = copy.deepcopy(llama(30)), peft.LoraConfig(target_modules=["q_proj"])
    if way == "wrapped":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            return peft.get_peft_model(policy, config)
    policy.add_adapter(config)
    return policy


class TestWeights:
    @pytest.mark.parametrize("way", ["wrapped", "added"])
    def test_a_policy_with_adapters_is_refused_with_what_to_do(self, way: str) -> None:
        with pytest.raises(CriticError, match=r"policy's weights carry adapters .* policy.merge_and_unload\(\)"):
            built(with_adapter(way), None, None)

    def test_a_merged_policy_is_copied(self) -> None:
        merged = with_adapter("wrapped").merge_and_unload()
        critic = built(merged, None, None)
        assert torch.equal(critic.trunk.embed_tokens.weight, merged.model.embed_tokens.weight)

    def test_a_policy_of_packed_weights_is_refused(self) -> None:
        policy = llama(30)
        for name, module in list(policy.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):  # as 4-bit weights: two in a byte, in one column
                packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
                policy.model.layers.get_submodule(name).weight = torch.nn.Parameter(packed, requires_grad=False)
        with pytest.raises(CriticError, match="policy's weights are quantised.* cannot be copied.* as backbone"):
            built(policy, None, None)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_a_policy_of_one_byte_weights_is_refused(self, dtype: torch.dtype) -> None:
        policy = llama(30)
        for module in policy.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.to(dtype), requires_grad=False)
        with pytest.raises(CriticError, match="policy's weights are quantised"):
            built(policy, None, None)

    def test_a_policy_quantised_by_torch_is_refused(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy = torch.ao.quantization.quantize_dynamic(llama(30), {torch.nn.Linear}, dtype=torch.qint8)
        with pytest.raises(CriticError, match="policy's weights are quantised"):
            mavis.ValueModelCritic.for_policy(policy, ["a"])

    def test_weights_that_cannot_be_read_are_refused_and_others_dequantised(self) -> None:
        with pytest.raises(CriticError, match="policy's weights are quantised"):
            built(with_weights_of(Opaque), None, None)
        critic = built(with_weights_of(Dequantisable), None, None)
        plain = tiny_llama().model.state_dict()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in critic.trunk.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_policy_in_half_precision_is_copied_to_float32(self, dtype: torch.dtype) -> None:
        policy = copy.deepcopy(llama(30)).to(dtype)
        critic = built(policy, None, None)
        assert torch.equal(critic.trunk.embed_tokens.weight, policy.model.embed_tokens.weight.float())
