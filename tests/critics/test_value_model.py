"""The value-model critic: its trunk, the inputs of its heads, its folder, its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast

import mavis
from mavis.critics import ValueModelCritic
from mavis.errors import CriticError
from tests.factories import tiny_llama

READOUTS = ("token", "candidates")


def llama(vocabulary: int = 30, seed: int = 0) -> Any:
    return tiny_llama(seed, vocab_size=vocabulary, num_hidden_layers=1)


def words(count: int, prefix: str = "t") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"{prefix}{i}": i for i in range(count)}, unk_token=f"{prefix}0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=f"{prefix}0")


def random_critic(policy: Any, **options: Any) -> ValueModelCritic:
    critic = ValueModelCritic.for_policy(
        policy, ["a", "b"], **({"hidden": 8, "rank": 4, "composition": "independent"} | options)
    )
    with torch.no_grad():
        critic.heads.outer.normal_()
        critic.heads.bias.normal_()
    return critic


IDS = torch.tensor([[0, 5, 7, 9, 11, 3], [2, 4, 8, 1, 6, 10]])
IS_TOKEN = torch.tensor([[False, True, True, True, True, True], [True, True, True, True, True, False]])
NO_STATES = torch.zeros(2, 3, 0)


@pytest.fixture
def policy() -> Any:
    return llama()


# The trunk


@pytest.mark.parametrize("readout", READOUTS)
def test_untrained_critic_predicts_zero(policy: Any, readout: Any) -> None:
    critic = ValueModelCritic.for_policy(policy, ["a", "b"], readout=readout)
    inputs = critic.rollout_inputs(IDS, IS_TOKEN, NO_STATES)[:, 0]
    assert (critic.values_from_inputs(inputs, torch.zeros(2, 1, dtype=torch.long)) == 0).all()
    assert not critic.training


def test_default_trunk_is_a_copy_of_the_policy(policy: Any) -> None:
    critic = ValueModelCritic.for_policy(policy, ["a"])
    ours, theirs = critic.trunk.state_dict(), policy.model.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()
    assert all(parameter.requires_grad for parameter in critic.trunk_parameters())
    assert not any(parameter.requires_grad for parameter in policy.parameters())


def test_backbone_is_a_config_or_a_folder(policy: Any, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    small = ValueModelCritic.for_policy(policy, ["a"], backbone=config, seed=1)
    assert small.trunk.config.model_type == "gpt2"
    assert small.heads.inner.shape[0] == 8
    same = ValueModelCritic.for_policy(policy, ["a"], backbone=config, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))
    other = llama(seed=5)
    other.save_pretrained(tmp_path / "other")
    words(30).save_pretrained(tmp_path / "other")
    loaded = ValueModelCritic.for_policy(policy, ["a"], backbone=tmp_path / "other", tokenizer=words(30))
    assert torch.equal(loaded.trunk.embed_tokens.weight, other.model.embed_tokens.weight)


# Inputs of the heads


def test_token_readout_reads_the_prefix_and_candidates_also_the_token(policy: Any) -> None:
    """Three response tokens each, of which the second row has two."""
    states = {}
    with torch.no_grad():
        for row in range(2):
            ids = IDS[row][IS_TOKEN[row]][None]
            states[row] = policy.model(input_ids=ids).last_hidden_state[0]
        normed = {row: torch.nn.functional.layer_norm(found, (16,)) for row, found in states.items()}
        token = ValueModelCritic.for_policy(policy, ["a"]).rollout_inputs(IDS, IS_TOKEN, NO_STATES)
        candidates = ValueModelCritic.for_policy(policy, ["a"], readout="candidates").rollout_inputs(
            IDS, IS_TOKEN, NO_STATES
        )
    torch.testing.assert_close(token[0], normed[0][-4:-1])
    torch.testing.assert_close(candidates[0], normed[0][-3:])
    torch.testing.assert_close(token[1, :2], normed[1][-3:-1])
    torch.testing.assert_close(candidates[1, :2], normed[1][-2:])


@pytest.mark.parametrize("readout", READOUTS)
def test_without_norm_heads_read_the_raw_state(policy: Any, readout: Any) -> None:
    plain, normed = (random_critic(policy, readout=readout, hidden=0, norm=norm) for norm in (False, True))
    found = plain.rollout_inputs(IDS, IS_TOKEN, NO_STATES)
    with torch.no_grad():
        row = IDS[0][IS_TOKEN[0]]
        state = policy.model(input_ids=row[None]).last_hidden_state[0]
    torch.testing.assert_close(found[0], state[-3:] if readout == "candidates" else state[-4:-1])
    expected = torch.nn.functional.layer_norm(found, (16,))
    torch.testing.assert_close(normed.rollout_inputs(IDS, IS_TOKEN, NO_STATES), expected)
    with plain.attach(policy):  # and while the policy generates
        policy(input_ids=row[None, :-1])
        values = plain.values(row[None, :-1], row[None, -1:])
    torch.testing.assert_close(values, plain.values_from_inputs(found[0, -1:], row[None, -1:]))


# Saving and loading


@pytest.mark.parametrize(
    ("readout", "options"),
    [("token", {}), ("candidates", {"hidden": 0, "norm": False}), ("token", {"composition": "conditioned"})],
)
def test_saved_critic_loads_unchanged(policy: Any, tmp_path: Path, readout: Any, options: Any) -> None:
    critic = random_critic(policy, readout=readout, **options)
    critic.save_pretrained(tmp_path / "critic")
    assert sorted(path.name for path in (tmp_path / "critic").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert str(tmp_path) not in (tmp_path / "critic" / "config.json").read_text()
    again = mavis.Critic.from_pretrained(tmp_path / "critic")
    assert isinstance(again, ValueModelCritic)
    assert again.settings() == critic.settings()
    assert not again.training
    with torch.no_grad():
        found = [c.rollout_inputs(IDS, IS_TOKEN, NO_STATES)[:, 1] for c in (critic, again)]
        ids = torch.tensor([[3], [9]])
        assert torch.equal(*found)
        assert torch.equal(*(c.values_from_inputs(i, ids) for c, i in zip((critic, again), found, strict=True)))


def test_folder_without_the_norm_setting_has_a_norm(policy: Any, tmp_path: Path) -> None:
    random_critic(policy).save_pretrained(tmp_path / "critic")
    path = tmp_path / "critic" / "config.json"
    config = json.loads(path.read_text())
    assert (config["settings"].pop("norm"), config["settings"].pop("lora_rank")) == (True, 0)
    path.write_text(json.dumps(config))
    assert mavis.Critic.from_pretrained(tmp_path / "critic").settings() == random_critic(policy).settings()


def test_folder_with_unknown_backbone_is_corrupt(policy: Any, tmp_path: Path) -> None:
    random_critic(policy).save_pretrained(tmp_path / "critic")
    path = tmp_path / "critic" / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["backbone"]["model_type"] = "nothing"
    path.write_text(json.dumps(config))
    with pytest.raises(CriticError, match="is corrupt or truncated: backbone has model_type 'nothing'"):
        mavis.Critic.from_pretrained(tmp_path / "critic")


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "tokens"}, "readout is 'tokens'.*did you mean 'token'"),
        ({"rank": 0}, "rank is 0, expected a whole number ≥ 1"),
        ({"hidden": -1}, "hidden is -1, expected a whole number ≥ 0"),
        ({"hidden": 0, "composition": "conditioned"}, "hidden is 0, but linear heads cannot read λ"),
        ({"backbone": GPT2Config(vocab_size=29, n_embd=8, n_layer=1, n_head=2)}, "backbone knows 29 tokens, but .* 30"),
        ({"backbone": "no/such/model"}, "backbone is 'no/such/model', which does not exist"),
    ],
)
def test_invalid_options_are_refused(policy: Any, options: Any, message: str) -> None:
    with pytest.raises(CriticError, match=message):
        ValueModelCritic.for_policy(policy, ["a"], **options)


def test_offloaded_policy_cannot_be_copied() -> None:
    with pytest.raises(CriticError, match="backbone is None, but the policy's weights are offloaded"):
        ValueModelCritic.for_policy(llama().to("meta"), ["a"])


def test_backbone_with_another_vocabulary_is_refused(policy: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "other")
    words(30, prefix="w").save_pretrained(tmp_path / "other")
    with pytest.raises(CriticError, match="has another vocabulary than the policy's tokenizer.*would mean other words"):
        ValueModelCritic.for_policy(policy, ["a"], backbone=tmp_path / "other", tokenizer=words(30))
