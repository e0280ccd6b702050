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
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from mavis.critics.trunk.backbone import load_trunk
from mavis.errors import MavisError, PolicyError
from mavis.policies import embedded, load_policy, save_policy
from mavis.rewards import RewardModel
from mavis.training import load_backbone


def change_settings(file: Path, **settings: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


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


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "half of the weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:1000]
    ),
    "weights of another size": lambda folder: change_settings(folder / "config.json", intermediate_size=7),
    "a size that is no number": lambda folder: change_settings(folder / "config.json", num_attention_heads="two"),
    "a list as the config": lambda folder: (folder / "config.json").write_text("[]"),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a tokenizer without its parts": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
}

READERS: dict[str, Callable[[Path], Any]] = {
    "policy": load_policy,
    "trunk": lambda folder: load_trunk(folder, "backbone"),
    "backbone": load_backbone,
    "reward model": lambda folder: RewardModel(folder, template="concat")(["a"], ["b"]),
}


# A trunk is read without a tokenizer.
@pytest.mark.parametrize(
    ("reader", "damage"),
    [(reader, damage) for reader in READERS for damage in DAMAGES if (reader, damage[:11]) != ("trunk", "a tokenizer")],
)
def test_a_damaged_folder_is_named(tiny_folder: Path, tmp_path: Path, reader: str, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    DAMAGES[damage](folder)
    with pytest.raises(MavisError, match=f"'{folder}',? (which )?cannot be loaded: .+ Hint: give a "):
        READERS[reader](folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [("adapter", "adapter"), ("gguf_file", "a.gguf"), ("dtype", "bfloat16"), ("device", "cuda"), ("revision", "main")],
)
def test_the_embedded_policy_takes_no_options(option: str, value: str) -> None:
    with pytest.raises(PolicyError, match=f"policy.{option} is '{value}', but the embedded policy has no options"):
        load_policy(None, **{option: value})  # type: ignore[arg-type]


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


def test_an_adapter_whose_names_peft_converts_is_merged(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Adapters of mixtures of experts, trained before transformers joined the experts' weights, name each of them."""
    pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=len(tiny_tokenizer), num_key_value_heads=2, num_local_experts=2, **sizes)
    torch.manual_seed(0)
    policy = MixtralForCausalLM(config).eval()
    policy.save_pretrained(tmp_path / "policy")
    tiny_tokenizer.save_pretrained(tmp_path / "policy")
    modules = [f"block_sparse_moe.experts.{expert}.{name}" for expert in range(2) for name in ("w1", "w2", "w3")]
    weights = {}
    for module in ["self_attn.q_proj", *modules]:
        name = f"base_model.model.model.layers.0.{module}"
        weights |= {f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(16, 2)}
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
    loaded: Any = load_policy(tmp_path / "policy", adapter=tmp_path / "adapter")[0]
    before, after = policy.model.layers[0], loaded.model.layers[0]
    query = weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    query = query @ weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    torch.testing.assert_close(after.self_attn.q_proj.weight, before.self_attn.q_proj.weight + query)
    first = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2"
    down = weights[f"{first}.lora_B.weight"] @ weights[f"{first}.lora_A.weight"]
    torch.testing.assert_close(after.mlp.experts.down_proj[1], before.mlp.experts.down_proj[1] + down)


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
        (
            lambda folder: change_settings(folder / "adapter_config.json", peft_type="IA3"),
            "an adapter of type 'IA3', expected 'LORA'. Hint: ",
        ),
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
        (
            lambda folder: change_settings(folder / "adapter_config.json", target_modules=["query"]),
            "cannot be merged: Target modules",
        ),
        (lambda folder: change_settings(folder / "adapter_config.json", r="two"), "cannot be merged: "),
        (lambda folder: change_settings(folder / "adapter_config.json", r=3), "cannot be merged: "),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"), "cannot be merged: Error while"),
        (
            lambda folder: change_settings(folder / "adapter_config.json", target_modules=["q_proj", "v_proj"]),
            r"does not fit the policy: '.*v_proj\.lora_A.*' is only in the policy",
        ),
        (
            lambda folder: change_settings(folder / "adapter_config.json", layers_to_transform=[0]),
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
