"""Loading a policy and its tokenizer from a folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.errors import PolicyError
from mavis.policies import embedded, load_policy, save_policy


def test_none_is_the_embedded_policy() -> None:
    policy, tokenizer = load_policy(None)
    assert policy.config.name_or_path == str(embedded.path())
    assert len(tokenizer) == policy.config.vocab_size


@pytest.mark.parametrize("as_string", [False, True])
def test_folder_is_loaded_for_generation(tiny_folder: Path, tiny_policy: Any, as_string: bool) -> None:
    policy, tokenizer = load_policy(str(tiny_folder) if as_string else tiny_folder)
    loaded: Any = policy
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tiny_policy.state_dict().items())
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None


def test_dtype_is_that_of_the_checkpoint_unless_given(tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    save_policy(tmp_path / "half", copy.deepcopy(tiny_policy).bfloat16(), tiny_tokenizer)
    dtypes = {}
    for dtype in ("auto", "float32", torch.float16):
        policy: Any = load_policy(tmp_path / "half", dtype=dtype)[0]
        dtypes[dtype] = policy.dtype
    assert dtypes == {"auto": torch.bfloat16, "float32": torch.float32, torch.float16: torch.float16}


def test_home_folder_is_expanded(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert load_policy(f"~/{tiny_folder.name}")[0].config.model_type == "llama"


def test_missing_padding_token_is_replaced_by_the_end_token(
    tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    tokenizer.eos_token = "good"
    save_policy(tmp_path / "end", tiny_policy, tokenizer)
    loaded = load_policy(tmp_path / "end")[1]
    assert loaded.pad_token_id == loaded.eos_token_id
    tokenizer.eos_token = None
    save_policy(tmp_path / "none", tiny_policy, tokenizer)
    with pytest.raises(PolicyError, match="has neither padding nor an end token"):
        load_policy(tmp_path / "none")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(PolicyError, match=f"policy.path is '{path}', which does not exist. Hint: correct the path"):
        load_policy(path)


def test_folder_without_safetensors_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(PolicyError, match="pickled', which cannot be loaded"):
        load_policy(tmp_path / "pickled")


def test_truncated_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="half', which cannot be loaded"):
        load_policy(tmp_path / "half")


@pytest.fixture
def adapter(tiny_policy: Any, tmp_path: Path) -> Path:
    """The folder of a LoRA adapter of the tiny policy."""
    save_adapter(tiny_policy, tmp_path / "adapter")
    return tmp_path / "adapter"


def save_adapter(policy: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # which peft reads
        adapted = peft.get_peft_model(copy.deepcopy(policy), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(folder)
    return adapted


def change_settings(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_is_merged_into_plain_weights(
    tiny_folder: Path, tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    adapted = save_adapter(tiny_policy, tmp_path / "adapter")
    loaded: Any = load_policy(tiny_folder, adapter=tmp_path / "adapter")[0]
    ids = tiny_tokenizer("the dog", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
        assert not torch.allclose(loaded(ids).logits, tiny_policy(ids).logits)
    assert not any("lora" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is no folder. Hint: give a folder with adapter_config.json and"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json. Hint: "),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors. Hint: "),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "has no adapter_model.safetensors; it holds adapter_model.bin, which is never read because",
        ),
        (lambda folder: change_settings(folder, peft_type="IA3"), "an adapter of type 'IA3', expected 'LORA'. Hint: "),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "an adapter of type None, expected 'LORA'"),
    ],
)
def test_what_is_no_lora_adapter_is_refused_before_anything_is_loaded(
    adapter: Path, spoil: Callable[[Path], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(adapter)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    with pytest.raises(PolicyError, match=f"policy.adapter is '{adapter}', (which )?{re.escape(message)}"):
        load_policy("owner/name", adapter=adapter)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: change_settings(folder, target_modules=["query"]), "cannot be merged: Target modules"),
        (lambda folder: change_settings(folder, r="two"), "cannot be merged: "),
        (lambda folder: change_settings(folder, r=3), "cannot be merged: "),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"), "cannot be merged: Error while"),
        (
            lambda folder: change_settings(folder, target_modules=["q_proj", "v_proj"]),
            r"does not fit the policy: '.*v_proj\.lora_A.*' is only in the policy",
        ),
        (
            lambda folder: change_settings(folder, layers_to_transform=[0]),
            r"does not fit the policy: '.*layers\.1\..*lora_A.*' is only in the adapter",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_folder: Path, adapter: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(adapter)
    with pytest.raises(PolicyError, match=rf"policy\.adapter is '{adapter}', which {message}"):
        load_policy(tiny_folder, adapter=adapter)


def test_the_end_of_a_turn_ends_a_response(tiny_policy: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["good"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} good {% endfor %}"
    save_policy(tmp_path / "chat", tiny_policy, tokenizer)
    ends = load_policy(tmp_path / "chat")[0].generation_config.eos_token_id
    assert ends == sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("good")})
