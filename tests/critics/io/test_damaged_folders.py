"""Critic folders that are damaged or absurd are refused before anything large is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mavis
from mavis.errors import CriticError

LOADERS: list[Callable[[Path], Any]] = [mavis.Critic.from_pretrained, mavis.Critic.describe]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
    critic.save_pretrained(tmp_path / "critic")
    return tmp_path / "critic"


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("size", [0, -1, 10**6, 10**12, 10**30, 1.5, "8", None])
def test_sizes_are_compared_with_the_weights_before_anything_is_allocated(
    folder: Path, load: Callable[[Path], Any], size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.loads((folder / "config.json").read_text())["settings"]
    for name in [name for name, value in settings.items() if type(value) is int and name != "seed"]:
        edit_config(folder, lambda config, name=name: config["settings"].update({name: size}))  # type: ignore[misc]
        with monkeypatch.context() as patch, pytest.raises(CriticError, match=r"critic"):
            patch.setattr(torch.nn.init, "uniform_", _refuse_real_tensors)
            load(folder)
        edit_config(folder, lambda config, name=name: config["settings"].update({name: settings[name]}))  # type: ignore[misc]
    load(folder)


def _refuse_real_tensors(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    assert tensor.is_meta, "memory was allocated"
    return tensor


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["reward_mean", "reward_std", "max_trained_lambda", None])
def test_weights_that_are_no_numbers_are_refused(folder: Path, name: str | None, number: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = name or next(key for key, tensor in tensors.items() if tensor.dim() == 2 and tensor.is_floating_point())
    tensors[name].view(-1)[0] = number
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CriticError, match=f"holds NaN or infinity in {name}"):
        mavis.Critic.from_pretrained(folder)


@pytest.mark.parametrize("load", LOADERS)
def test_a_standard_deviation_of_zero_is_refused(folder: Path, load: Callable[[Path], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["reward_std"][0] = 0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CriticError, match="holds zeros or negative numbers in reward_std"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("entry", ["betas", "kl", "floor", "temperature"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_calibration_without_numbers_is_refused(
    folder: Path, load: Callable[[Path], Any], entry: str, number: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    value = config["calibration"][entry]
    config["calibration"][entry] = {"betas": [12345.0], "kl": [[12345.0]]}.get(entry, 12345.0)
    assert value is not None
    (folder / "config.json").write_text(json.dumps(config).replace("12345.0", number))
    with pytest.raises(CriticError, match=r"config\.json' is damaged: it holds the number"):
        load(folder)


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "a\x00", "a\u2028b", "a\u202eb", "\x9b2J", "a\x07", ""])
def test_names_with_control_characters_are_refused_and_not_printed(folder: Path, name: str) -> None:
    edit_config(folder, lambda config: config.update(objectives=[name, "b"]))
    with pytest.raises(CriticError) as raised:
        mavis.Critic.from_pretrained(folder)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a/b", "..", "a b", "größe", "名"])
def test_names_that_look_like_paths_stay_inside_the_critic(folder: Path, tmp_path: Path, name: str) -> None:
    edit_config(folder, lambda config: config.update(objectives=[name, "b"]))
    critic = mavis.Critic.from_pretrained(folder)
    critic.save_pretrained(tmp_path / "again")
    assert mavis.Critic.from_pretrained(tmp_path / "again").objectives == (name, "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "critic"]
