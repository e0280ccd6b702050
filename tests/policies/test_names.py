"""Names of policies: what is a path is never asked for on the hub again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.critics.trunk.backbone import load_trunk
from mavis.errors import MavisError, PolicyError
from mavis.policies import load_policy
from mavis.policies.names import check_source, load_errors
from mavis.rewards import RewardModel


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names that the hub is asked for; it has none of them."""
    asked: list[str] = []

    def model_info(self: Any, name: str, **options: Any) -> None:
        asked.append(name)
        raise OSError("no network")

    def from_pretrained(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the hub would be asked again and again")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", from_pretrained)
    for name in ("AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    return asked


READERS: list[Callable[[str], Any]] = [
    load_policy,
    mavis.Critic.from_pretrained,
    lambda name: load_trunk(name, "backbone"),
    lambda name: RewardModel(name)(["a"], ["b"]),
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["./nope", "../nope", "/nope", "~/nope", "a/b/nope", "nope/"])
def test_paths_are_never_asked_for(requests: list[str], read: Callable[[str], Any], name: str) -> None:
    with pytest.raises(MavisError, match="which does not exist"):
        read(name)
    assert not requests


@pytest.mark.parametrize("read", READERS)
def test_what_looks_like_a_path_is_asked_for_once(requests: list[str], read: Callable[[str], Any]) -> None:
    with pytest.raises(MavisError, match="is 'outputs/nope', which does not exist, and the hub has no such model: no"):
        read("outputs/nope")
    assert requests == ["outputs/nope"]


def test_names_on_the_hub_pass_without_a_request(requests: list[str], tmp_path: Path) -> None:
    for name in ("owner/name", "gpt2", "outputs", str(tmp_path)):
        check_source(name, "policy.path", PolicyError)
    assert not requests


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_not_blamed_on_the_model(error: type[Exception]) -> None:
    with pytest.raises(error), load_errors("policy.path is 'a', which", PolicyError, "give another."):
        raise error


def test_what_else_is_raised_while_loading_names_the_model() -> None:
    with pytest.raises(PolicyError) as caught, load_errors("policy.path is 'a', which", PolicyError, "give another."):
        raise KeyError("config")
    assert str(caught.value).startswith("policy.path is 'a', which cannot be loaded: ")
    assert str(caught.value).endswith("Hint: give another.")
    assert isinstance(caught.value.__cause__, KeyError)
