"""Value models of the paper's own code have the same values after the import; other folders are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LogitsProcessor

import mavis
from mavis.critics import Critic, CriticGroup, ValueModelCritic
from mavis.errors import CriticError
from tests.factories import tiny_llama

peft = pytest.importorskip("peft")
pytestmark = [  # peft about itself: how it asks transformers, and that it saves a longer embedding
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TOKENS, POLICY_TOKENS = 30, 31
"""Vocabulary sizes of the base, and of the policy, whose tokenizer has an additional padding token."""
PROMPTS = torch.tensor([[30, 30, 5, 9], [3, 7, 1, 4]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None}
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.2,
    "bias": "none",
    "task_type": "SEQ_CLS",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "modules_to_save": ["score"],
}
"""The paper's adapters, at a smaller rank."""
Train = Callable[..., Path]


def causal(tokens: int, seed: int, hidden: int = 16) -> Any:
    return tiny_llama(seed, vocab_size=tokens, hidden_size=hidden, num_key_value_heads=1, initializer_range=0.2, **ENDS)


@pytest.fixture
def policy() -> Any:
    return causal(POLICY_TOKENS, seed=0, hidden=24)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    causal(TOKENS, seed=1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(base: Path, outputs: int, tokens: int) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs, dtype=torch.float32)
    if tokens != TOKENS:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    model.config.pad_token_id = None
    return model


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Train:
    """A function that writes the folder of a value model as the paper's training does, with random weights."""

    def make(name: str = "help", outputs: int = 1, tokens: int = POLICY_TOKENS, **options: Any) -> Path:
        torch.manual_seed(len(name))
        model = peft.get_peft_model(classifier(base, outputs, tokens), peft.LoraConfig(**(LORA | options)))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name or "score" in parameter_name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


class Official:
    """The official forward: whole sequences, one candidate at a time, the score of the last token."""

    def __init__(self, base: Path, folder: Path, outputs: int = 1, tokens: int = POLICY_TOKENS) -> None:
        self.model = peft.PeftModel.from_pretrained(classifier(base, outputs, tokens), folder).eval()

    def values(self, prefix: Tensor) -> Tensor:
        """(V, outputs) for every token after a prefix (L,)."""
        with torch.no_grad():
            each = [
                self.model(input_ids=torch.cat([prefix, torch.tensor([token])])[None]).logits[0]
                for token in range(POLICY_TOKENS)
            ]
        return torch.stack(each)


class RecordValues(LogitsProcessor):
    """Record all values of a critic at every step, with the prefixes."""

    def __init__(self, critic: Critic) -> None:
        self.critic = critic
        self.recorded: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.recorded.append((input_ids, self.critic.values(input_ids, None)))
        return scores


def generated(policy: Any, critic: Critic, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Prefixes (L,) of a greedy generation, each with the values (V, M) of every next token."""
    record = RecordValues(critic)
    with critic.attach(policy):
        policy.generate(
            input_ids=PROMPTS, attention_mask=MASK, do_sample=False, max_new_tokens=steps, logits_processor=[record]
        )
    return [
        (ids[row, int(MASK[row].argmax()) :], values[row]) for ids, values in record.recorded for row in range(len(ids))
    ]


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# Values


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_values_during_generation_equal_the_official_forward(
    policy: Any, base: Path, train: Train, options: dict[str, Any]
) -> None:
    folder = train(**options)
    critic = mavis.import_official({"help": folder}, policy)
    assert isinstance(critic, ValueModelCritic)
    assert critic.objectives == ("help",)
    assert critic.settings() | {"readout": "candidates", "hidden": 0, "norm": False} == critic.settings()
    assert critic.composition == "independent"
    assert not critic.training
    official = Official(base, folder)
    for prefix, values in generated(policy, critic):
        torch.testing.assert_close(values, official.values(prefix), rtol=1e-5, atol=1e-5)
    assert (critic.normalise(torch.tensor([3.0])) == 3.0).all()  # the scale of its values is that of the raw rewards


def test_one_folder_per_objective_makes_a_group(policy: Any, base: Path, train: Train) -> None:
    folders = {"help": train("help"), "harm": train("harmless")}
    critic = mavis.import_official(folders, policy)
    assert isinstance(critic, CriticGroup)
    assert critic.objectives == ("help", "harm")
    officials = [Official(base, folder) for folder in folders.values()]
    for prefix, values in generated(policy, critic, steps=2):
        expected = torch.cat([official.values(prefix) for official in officials], dim=1)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_distilled_model_becomes_one_critic(policy: Any, base: Path, train: Train) -> None:
    folder = train("distilled", outputs=3)
    critic = mavis.import_official({("help", "harm", "humor"): folder}, policy)
    assert isinstance(critic, ValueModelCritic)
    assert critic.objectives == ("help", "harm", "humor")
    official = Official(base, folder, outputs=3)
    for prefix, values in generated(policy, critic, steps=2):
        torch.testing.assert_close(values, official.values(prefix), rtol=1e-5, atol=1e-5)


def test_reward_statistics_normalise_the_values(policy: Any, train: Train) -> None:
    folders: Mapping[Any, Path] = {"help": train("help"), ("harm", "humor"): train("both", outputs=2)}
    raw = mavis.import_official(folders, policy)
    mean, std = {"help": 2.0, "humor": -1.0}, {"help": 4.0, "harm": 0.5}
    critic = mavis.import_official(folders, policy, reward_mean=mean, reward_std=std)
    assert critic.reward_mean.tolist() == [2.0, 0.0, -1.0]
    assert critic.reward_std.tolist() == [4.0, 0.5, 1.0]
    for (_, plain), (_, values) in zip(generated(policy, raw), generated(policy, critic), strict=True):
        torch.testing.assert_close(values, critic.normalise(plain).float(), rtol=1e-5, atol=1e-5)


def test_base_overrides_the_one_in_the_adapter(policy: Any, base: Path, train: Train) -> None:
    folder = train()
    expected = generated(policy, mavis.import_official({"help": folder}, policy))
    edit(folder, base_model_name_or_path="no/such/model")
    with pytest.raises(CriticError, match="base is 'no/such/model', which does not exist"):
        mavis.import_official({"help": folder}, policy)
    found = generated(policy, mavis.import_official({"help": folder}, policy, base=base))
    assert all(torch.equal(one[1], other[1]) for one, other in zip(found, expected, strict=True))


def test_adapter_without_embedding_uses_that_of_the_base(base: Path, train: Train) -> None:
    folder = train(tokens=TOKENS)
    assert not [name for name in load_file(folder / "adapter_model.safetensors") if "embed" in name]
    policy = causal(TOKENS, seed=0)
    critic = mavis.import_official({"help": folder}, policy)
    prefix = torch.tensor([4, 8, 2])
    with critic.attach(policy):
        policy(input_ids=prefix[None])
        values = critic.values(prefix[None], torch.arange(TOKENS)[None])[0]
    with torch.no_grad():
        last = Official(base, folder, tokens=TOKENS).model(input_ids=torch.tensor([[4, 8, 2, TOKENS - 1]])).logits[0]
    torch.testing.assert_close(values[-1], last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("added", [1, 3])
def test_added_tokens_that_the_adapter_was_saved_without_have_the_mean_embedding(
    base: Path, train: Train, tmp_path: Path, added: int
) -> None:
    folder = train(tokens=TOKENS)
    policy = causal(TOKENS + added, seed=0)
    critic = mavis.import_official({"help": folder}, policy)
    assert isinstance(critic, ValueModelCritic)
    embedding = critic.trunk.get_input_embeddings().weight
    own = AutoModelForSequenceClassification.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(embedding[:TOKENS], own)
    torch.testing.assert_close(embedding[TOKENS:], own.mean(0).expand(added, -1))
    official = Official(base, folder, tokens=TOKENS)  # of tokens that it has, the values are its own
    prefix = torch.tensor([4, 8, 2])
    with critic.attach(policy):
        policy(input_ids=prefix[None])
        values = critic.values(prefix[None], torch.arange(TOKENS)[None])[0]
    with torch.no_grad():
        last = official.model(input_ids=torch.tensor([[4, 8, 2, TOKENS - 1]])).logits[0]
    torch.testing.assert_close(values[-1], last, rtol=1e-5, atol=1e-5)
    critic.save_pretrained(tmp_path / "critic")
    assert mavis.Critic.from_pretrained(tmp_path / "critic").settings() == critic.settings()


def test_import_and_saved_critic_work_without_peft(
    policy: Any, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train()
    monkeypatch.setitem(sys.modules, "peft", None)
    critic = mavis.import_official({"help": folder}, policy, reward_mean={"help": 1.0}, reward_std={"help": 2.0})
    critic.save_pretrained(tmp_path / "critic")
    again = mavis.Critic.from_pretrained(tmp_path / "critic")
    assert again.settings() == critic.settings()
    for name, tensor in critic.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert str(tmp_path) not in (tmp_path / "critic" / "config.json").read_text()


# Errors


@pytest.mark.parametrize("folders", [{}, "value_models", None])
def test_folders_without_objectives_are_refused(policy: Any, folders: Any) -> None:
    with pytest.raises(CriticError, match="folders is .*, expected an adapter folder for each objective. Hint"):
        mavis.import_official(folders, policy)


def test_folder_without_adapter_is_refused(policy: Any, base: Path, tmp_path: Path) -> None:
    for folder, missing in ((tmp_path / "nowhere", "does not exist"), (base, "has no adapter_config.json")):
        with pytest.raises(CriticError, match=f"folders names '{folder}', which {missing}, expected an adapter. Hint"):
            mavis.import_official({"help": folder}, policy)


def test_pickled_adapter_is_refused(policy: Any, train: Train) -> None:
    folder = train()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CriticError, match=r"has no adapter_model.safetensors\. Hint: save the adapter again"):
        mavis.import_official({"help": folder}, policy)
    (folder / "adapter_model.bin").write_bytes(b"whatever")
    with pytest.raises(CriticError, match="only adapter_model.bin, which is never read because loading a pickle"):
        mavis.import_official({"help": folder}, policy)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_truncated_adapter_is_refused(policy: Any, train: Train, name: str) -> None:
    path = train() / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CriticError, match="is corrupt or truncated: .* Hint: copy it again"):
        mavis.import_official({"help": path.parent}, policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, r"task_type \('LORA', 'CAUSAL_LM'\), expected \('LORA', 'SEQ_CLS'\)"),
        ({"peft_type": "IA3"}, r"task_type \('IA3', 'SEQ_CLS'\), expected"),
        ({"use_dora": True}, "an adapter with use_dora=True, expected plain LoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "an adapter with alpha_pattern={'q_proj': 3}, expected plain LoRA"),
        ({"init_lora_weights": "pissa"}, "an adapter with init_lora_weights='pissa', expected plain LoRA"),
        ({"base_model_name_or_path": None}, "base is None, and the adapter in .* names no model"),
    ],
)
def test_other_kinds_of_adapters_are_refused(policy: Any, train: Train, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CriticError, match=message):
        mavis.import_official({"help": edit(train(), **changes)}, policy)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("score", None, "has an adapter without a score layer"),
        (
            None,
            "base_model.model.score.bias",
            "has the tensor score.bias, expected low-rank adapters of linear layers, a score",
        ),
        ("lora_B", None, "does not fit the adapter in .*: 'model.layers.0.*lora_B.weight'"),
        (None, "base_model.model.model.layers.7.mlp.up_proj.lora_", "does not fit the adapter in .*layers.7"),
    ],
    ids=["no score", "a bias", "half an adapter", "a layer more"],
)
def test_adapter_with_unexpected_tensors_is_refused(
    policy: Any, train: Train, drop: str | None, add: str | None, message: str
) -> None:
    folder = train()
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if drop is None or drop not in name}
    if add is not None:
        names = [f"{add}A.weight", f"{add}B.weight"] if add.endswith("_") else [add]
        kept |= {name: torch.ones(4, 4) for name in names}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(CriticError, match=message):
        mavis.import_official({"help": folder}, policy)


def test_base_of_another_shape_is_refused(policy: Any, train: Train, tmp_path: Path) -> None:
    causal(TOKENS, seed=0, hidden=12).save_pretrained(tmp_path / "other")
    with pytest.raises(CriticError, match="base '.*other' does not fit the adapter in .*Hint: pass the language model"):
        mavis.import_official({"help": train()}, policy, base=tmp_path / "other")


@pytest.mark.parametrize(("key", "outputs"), [("help", 3), (("help", "harm"), 1)])
def test_number_of_names_must_match_the_outputs(policy: Any, train: Train, key: Any, outputs: int) -> None:
    with pytest.raises(CriticError, match=f"a value model with {outputs} outputs, but folders names [12] for it: help"):
        mavis.import_official({key: train(outputs=outputs)}, policy)


@pytest.mark.parametrize("adds", ["embedding", "tokens"])
def test_value_model_with_fewer_tokens_than_the_policy_is_refused(train: Train, adds: str) -> None:
    """Few added tokens are padding and the like, but a hundred are another tokenizer, and so is a saved embedding."""
    folder, policy_tokens = (train(), 32) if adds == "embedding" else (train(tokens=TOKENS), TOKENS + 65)
    with pytest.raises(CriticError, match=f"knows 3[01] tokens, but the policy writes {policy_tokens}. Hint: use the"):
        mavis.import_official({"help": folder}, causal(policy_tokens, seed=0))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (
            {"reward_mean": {"helpp": 1.0}},
            "reward_mean names objective 'helpp', but folders has: help. Hint: did you mean 'help'",
        ),
        ({"reward_mean": {"help": float("nan")}}, "reward_mean of 'help' is nan, expected a finite number."),
        ({"reward_std": {"help": 0.0}}, "reward_std of 'help' is 0.0, expected a finite number > 0."),
    ],
)
def test_invalid_statistics_are_refused(policy: Any, statistics: dict[str, Any], message: str) -> None:
    with pytest.raises(CriticError, match=message):
        mavis.import_official({"help": Path("help")}, policy, **statistics)


def test_repeated_objective_is_refused(policy: Any, train: Train) -> None:
    with pytest.raises(CriticError, match="objective 'help' belongs to two of the critics"):
        mavis.import_official({"help": train(), ("help",): train()}, policy)
