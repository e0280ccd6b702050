"""The model card: its header for the hub, its tables, and that nothing depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from mavis.critics import Calibration, Critic, ValueModelCritic
from mavis.policies.names import is_hub_id, policy_name


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_card_shows_the_contents_of_the_critic(make_tiny_critic: Any, tmp_path: Path) -> None:
    critic = make_tiny_critic()
    critic.set_normalisation(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    critic.calibration = Calibration([1.0, 2.0], [[0.5, 1.5], [0.25, 0.75], [0.3, 0.9]], 64, 40, 0.8)
    critic.about = {
        "policy": "owner/model",
        "data": "prompts.txt",
        "training": {"iterations": 2, "fit.learning_rate": 0.003},
        "efficiency": [
            {"weights": {"good": 0.5, "brevity": 0.5}, "kl": 2.0, "efficiency": 0.875},
            {"weights": {"good": 1.0, "brevity": 0.0}, "kl": 2.0, "efficiency": None},
        ],
    }
    critic.save_pretrained(tmp_path / "critic")
    card = card_of(tmp_path / "critic")
    assert card.data.to_dict() == {
        "library_name": "mavis",
        "tags": ["mavis", "value-guided-decoding"],
        "base_model": "owner/model",
    }
    mean, std = critic.reward_mean.tolist(), critic.reward_std.tolist()
    assert rows(card.text, "Objectives") == [
        ["good", f"{mean[0]:.4g}", f"{std[0]:.4g}"],
        ["brevity", f"{mean[1]:.4g}", f"{std[1]:.4g}"],
    ]
    assert 'weights={"good": 1.0}, beta=1.0)' in card.text
    assert "owner/model: llama, hidden size 32" in card.text
    assert critic.fingerprint.weights in card.text
    training = dict(rows(card.text, "Training"))
    assert training["data"] == "prompts.txt"
    assert training["iterations"] == "2"
    assert training["fit.learning_rate"] == "0.003"
    assert training["composition"] == "independent"
    assert training["hidden"] == "16"
    assert rows(card.text, "Calibration") == [
        ["good 1", "0.5", "1.5"],
        ["brevity 1", "0.25", "0.75"],
        ["good 0.5, brevity 0.5", "0.3", "0.9"],
    ]
    assert rows(card.text, "Frontier efficiency") == [
        ["good 0.5, brevity 0.5", "2", "0.875"],
        ["good 1", "2", "–"],
    ]


def test_card_shows_what_is_unknown(make_tiny_critic: Any, tmp_path: Path) -> None:
    make_tiny_critic("good").save_pretrained(tmp_path / "critic")
    text = card_of(tmp_path / "critic").text
    for said in ("Unnamed policy", "None: use `beta`", "Not measured;"):
        assert said in text
    assert card_of(tmp_path / "critic").data.to_dict().get("base_model") is None


def test_about_survives_saving_and_loading(make_tiny_critic: Any, tmp_path: Path) -> None:
    critic = make_tiny_critic()
    critic.about = {"policy": "tiny", "efficiency": [{"weights": {"good": 1.0}, "kl": 1.0, "efficiency": 0.5}]}
    critic.save_pretrained(tmp_path / "one")
    again = Critic.from_pretrained(tmp_path / "one")
    assert again.about == critic.about
    again.save_pretrained(tmp_path / "two")
    for name in ("README.md", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_loading_does_not_need_the_card(make_tiny_critic: Any, tmp_path: Path) -> None:
    critic = make_tiny_critic()
    critic.save_pretrained(tmp_path / "critic")
    (tmp_path / "critic" / "README.md").unlink()
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    del config["about"]  # as in versions without a card
    (tmp_path / "critic" / "config.json").write_text(json.dumps(config))
    assert Critic.from_pretrained(tmp_path / "critic").about == {}


@pytest.mark.parametrize(
    "about",
    [
        {"training": "by hand"},
        {"efficiency": [{"kl": 1.0}]},
        {"efficiency": 0.9},
        {"efficiency": [{"weights": {"good": "all"}, "kl": 1.0, "efficiency": 1.0}]},
    ],
)
def test_critic_is_saved_without_card_if_about_is_malformed(
    make_tiny_critic: Any, tmp_path: Path, about: dict[str, Any]
) -> None:
    critic = make_tiny_critic()
    critic.about = about
    with pytest.warns(UserWarning, match="saved without a new model card, because its `about` is malformed"):
        critic.save_pretrained(tmp_path / "critic")
    assert Critic.from_pretrained(tmp_path / "critic").about == about


def test_value_model_has_a_card(tiny_policy: Any, tmp_path: Path) -> None:
    ValueModelCritic.for_policy(
        tiny_policy, ["good"], readout="candidates", hidden=0, composition="independent"
    ).save_pretrained(tmp_path / "critic")
    training = dict(rows(card_of(tmp_path / "critic").text, "Training"))
    assert training["kind"] == "value_model"
    assert training["readout"] == "candidates"


@pytest.mark.parametrize("name", ["a|b", "--- license: mit ---", "``` `", "# head"])
def test_names_are_escaped(make_tiny_critic: Any, tmp_path: Path, name: str) -> None:
    critic = make_tiny_critic(name, "good")
    critic.about = {"policy": name, "data": name}
    critic.save_pretrained(tmp_path / "critic")
    text = (tmp_path / "critic" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header == {"library_name": "mavis", "tags": ["mavis", "value-guided-decoding"]}
    assert len(rows(card_of(tmp_path / "critic").text, "Objectives")) == 2
    assert Critic.from_pretrained(tmp_path / "critic").objectives == (name, "good")


def test_local_paths_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {
        "owner/model": "model",  # a local folder takes precedence over the hub
        "owner/other": "owner/other",
        str(tmp_path / "secret" / "llama"): "llama",
        "": None,
    }
    assert {name: policy_name(SimpleNamespace(name_or_path=name)) for name in names} == names
    assert policy_name(object()) is None
    known = {"a/b": True, "a": False, "a/b/c": False, "./a": False, "/a/b": False, "a b/c": False, "owner/model": False}
    assert {name: is_hub_id(name) for name in known} == known
