"""A command in the folder of a running one is refused before anything is written there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mavis.errors import ConfigError
from mavis.policies import embedded
from mavis.utils.locks import LOCK
from tests.lock_holder import locked_elsewhere


@pytest.mark.parametrize("command", ["train", "align", "train-reward", "distill", "evaluate"])
def test_a_refused_command_leaves_the_settings_of_the_running_one_as_they_are(
    mavis: Any, tmp_path: Path, command: str
) -> None:
    kept = tmp_path / "run" / ".hydra" / "config.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text("seed: 0\n")
    with locked_elsewhere(tmp_path / "run"):
        before = {path.name for path in kept.parent.parent.iterdir()}
        ran = mavis(command, "seed=7", "output=run")
        assert {path.name for path in kept.parent.parent.iterdir()} == before
    assert ran.code == 2
    assert ran.err.startswith("mavis: folder 'run' is in use by process ")
    assert ran.err.count("\n") == 1
    assert kept.read_text() == "seed: 0\n"
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("command", "stage"), [("evaluate", "mavis.evaluation.evaluate"), ("demo", "mavis.cli.demo.train")]
)
def test_commands_of_several_stages_hold_their_folder_throughout(
    mavis: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, stage: str
) -> None:
    held: list[bool] = []

    def stop(*_: object, **__: object) -> None:
        held.append((tmp_path / "run" / LOCK).is_file())
        raise ConfigError("that is enough.", "go on.")

    monkeypatch.setattr(stage, stop)
    checkpoint = [f"checkpoint={embedded.critic_path()}"] if command == "evaluate" else []
    ran = mavis(command, *checkpoint, "output=run")
    assert ran.code == 2
    assert "that is enough" in ran.err
    assert held == [True]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_folder_of_a_critic_is_no_output(mavis: Any, tmp_path: Path, command: str) -> None:
    shutil.copytree(embedded.critic_path(), tmp_path / "critic")
    before = sorted(path.name for path in (tmp_path / "critic").iterdir())
    ran = mavis(command, "output=critic")
    assert ran.code == 2
    assert ran.err.startswith("mavis: folder 'critic' holds a critic or a model; a run in it would be lost")
    assert sorted(path.name for path in (tmp_path / "critic").iterdir()) == before
