"""A vector of a LoRA adapter: scaling · B·A, as peft computes it."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from mavis.errors import MissingPackageError, VectorError
from mavis.vectors import AlignmentVector, Vectors

peft = pytest.importorskip("peft")

Build = Callable[..., Any]
Adapt = Callable[..., tuple[Any, Path]]


@pytest.fixture
def adapt(tmp_path: Path) -> Adapt:
    """A function that attaches a random adapter to a copy of a policy; returns that and the adapter's folder."""

    def make(base: Any, **settings: Any) -> tuple[Any, Path]:
        settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False} | settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft about transformers
            adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "modules_to_save" in name:
                        parameter.add_(0.1)
            adapted.save_pretrained(tmp_path / "adapter")
        return adapted.eval(), tmp_path / "adapter"

    return make


def test_it_is_scaling_times_b_times_a(build: Build, adapt: Adapt) -> None:
    base = build()
    _, folder = adapt(base)
    vector = AlignmentVector.between(base, folder)
    kept = load_file(folder / "adapter_model.safetensors")
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert list(vector.tensors) == [f"{name}.weight" for name in names]
    for name in names:
        a, b = (kept[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(vector.tensors[f"{name}.weight"], 6 / 2 * b @ a)


SETTINGS = {
    "ranks and layers": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 4},
        "layers_to_transform": [1],
    },
    "rank-stabilised": {"use_rslora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole modules": {"modules_to_save": ["model.norm", "lm_head"]},
}


@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "model"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_at_1_the_policy_is_the_adapted_one(
    build: Build,
    adapt: Adapt,
    saved: Callable[..., Path],
    logits: Callable[[Any], torch.Tensor],
    settings: dict[str, Any],
    in_memory: bool,
) -> None:
    base = build()
    adapted, folder = adapt(base, **settings)
    vector = AlignmentVector.between(base if in_memory else saved(base, "base"), folder)
    assert vector.is_from(base)
    wanted = logits(adapted)
    assert (logits(base) - wanted).abs().max() > 0.01
    with Vectors({"v": vector}).applied(base, {"v": 1}):
        torch.testing.assert_close(logits(base), wanted, atol=2e-5, rtol=1e-5)


def test_layers_with_transposed_weights_work(adapt: Adapt, logits: Callable[[Any], torch.Tensor]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_layer=1, n_embd=16, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    adapted, folder = adapt(base, target_modules=["c_attn"], fan_in_fan_out=True)
    with Vectors({"v": AlignmentVector.between(base, folder)}).applied(base, {"v": 1}):
        torch.testing.assert_close(logits(base), logits(adapted), atol=2e-5, rtol=1e-5)


def test_an_adapter_at_zero_changes_nothing(build: Build, adapt: Adapt) -> None:
    base = build()
    _, folder = adapt(base, init_lora_weights=True)
    assert not AlignmentVector.between(base, folder).tensors


@pytest.mark.parametrize(
    ("tied", "settings", "message"),
    [
        (False, {"use_dora": True}, "variant of LoRA|not a plain LoRA"),
        (False, {"bias": "all", "target_modules": ["q_proj"]}, None),
        (False, {"lora_bias": True}, "which is not a plain LoRA"),
        (False, {"trainable_token_indices": [1]}, "which is not a plain LoRA"),
        (True, {"target_modules": ["q_proj", "lm_head"]}, "changes 'lm_head.weight', which is tied to another"),
        (True, {"modules_to_save": ["lm_head"]}, "changes 'lm_head.weight', which is tied to another"),
    ],
)
def test_adapters_other_than_b_times_a_are_refused(
    build: Build, adapt: Adapt, tied: bool, settings: dict[str, Any], message: str | None
) -> None:
    base = build(tied)
    _, folder = adapt(base, **settings)
    if message is None:  # this architecture has no biases
        assert AlignmentVector.between(base, folder).tensors
        return
    with pytest.raises(VectorError, match=message) as raised:
        AlignmentVector.between(base, folder)
    assert "merge_and_unload" in raised.value.hint


def test_an_adapter_of_another_base_is_refused(build: Build, adapt: Adapt) -> None:
    _, folder = adapt(build(num_hidden_layers=3))
    with pytest.raises(VectorError, match="does not fit base: .*layers.2.self_attn.q_proj.* is only in the adapter"):
        AlignmentVector.between(build(), folder)
    with pytest.raises(VectorError, match="does not fit base: .*layers.3.self_attn.q_proj.* is only in the base"):
        AlignmentVector.between(build(num_hidden_layers=4), folder)
    with pytest.raises(
        VectorError, match="cannot be attached to base: .*Hint: pass the base that the adapter was trained on"
    ):
        AlignmentVector.between(build(num_hidden_layers=3, hidden_size=32), folder)


def test_a_folder_without_a_plain_adapter_is_refused(build: Build, adapt: Adapt, monkeypatch: Any) -> None:
    base = build()
    _, folder = adapt(base)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for changes, message in [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; expected a plain LoRA"),
        ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which changes the base as well"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(VectorError, match=message):
            AlignmentVector.between(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(VectorError, match="cannot be attached to base"):
        AlignmentVector.between(base, folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(VectorError, match=r"has no adapter_model.safetensors; pickles are never read"):
        AlignmentVector.between(base, folder)
    save_file(weights, folder / "adapter_model.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        MissingPackageError, match="an adapter needs peft, which is not installed. Hint: pip install 'mavis-decoding"
    ):
        AlignmentVector.between(base, folder)
