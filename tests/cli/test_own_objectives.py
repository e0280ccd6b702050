"""Objectives of one's own, named on the command line by module and name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mavis.cli.own_objectives import import_objective, register_own_objectives
from mavis.critics import Critic
from mavis.errors import ConfigError
from tests.lock_holder import locked_elsewhere

MODULE = """
def warmth(prompts, responses, unit=1.0):
    return [(response.count("a") + 0.5 * response.count("e")) / unit for response in responses]


class Cold:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, prompts, responses):
        return [-len(response) / self.scale for response in responses]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory of the commands."""
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return "own_rewards"


def recorded(run: Path) -> Any:
    return json.loads((run / "objectives.json").read_text())


def test_a_function_and_a_class_are_trained_for_beside_a_shipped_objective(
    mavis: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    others = [item for item in small if not item.startswith("objective=")]
    chosen = ("objective=[brevity,own_rewards:warmth,own_rewards:Cold]", "+objectives.Cold.scale=3")
    ran = mavis("train", *others, *chosen, "+objectives.warmth.unit=2", "output=run")
    assert ran.code == 0, ran.err
    assert Critic.from_pretrained(tmp_path / "run" / "critic").objectives == ("brevity", "warmth", "Cold")
    assert recorded(tmp_path / "run")["Cold"]["scale"] == 3


@pytest.mark.parametrize("command", ["train", "align"])
def test_a_command_in_the_folder_of_a_running_one_leaves_its_record_alone(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, command: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "objectives.json").write_text("{}")
    arguments = small if command == "train" else ("policy=tiny", "objective=[brevity]", "data=openings")
    with locked_elsewhere(tmp_path / "run"):
        ran = mavis(command, *arguments, "objectives.brevity.scale=7", "output=run")
    assert ran.code != 0
    assert "is in use by process" in ran.err
    assert recorded(tmp_path / "run") == {}


def test_it_can_have_another_name(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    others = [item for item in small if not item.startswith("objective=")]
    ran = mavis("train", *others, "objective=[brevity]", "+objective@objectives.nice=own_rewards:warmth", "output=run")
    assert ran.code == 0, ran.err
    assert Critic.from_pretrained(tmp_path / "run" / "critic").objectives == ("brevity", "nice")


def test_a_sweep_runs_over_them(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    others = [item for item in small if not item.startswith("objective=")]
    ran = mavis("train", "-m", *others, "objective=own_rewards:warmth,[brevity]", "output=sweep")
    assert ran.code == 0, ran.err
    trained = {Critic.from_pretrained(path).objectives for path in (tmp_path / "sweep").glob("*/critic")}
    assert trained == {("warmth",), ("brevity",)}


def test_options_reach_functions_and_classes() -> None:
    assert import_objective("own_rewards:warmth", unit=0.5)(["p"], ["banane"]) == [5.0]
    assert import_objective("own_rewards:Cold", scale=2.0)(["p"], ["abcd"]) == [-2.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:f", "objective 'no_such_module:f' names no module 'no_such_module'."),
        ("own_rewards:warmpth", "module 'own_rewards' has no 'warmpth'."),
    ],
)
def test_what_is_not_there_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        import_objective(source)
    assert refused.value.message == message


def test_a_package_that_the_module_lacks_is_not_taken_for_the_module(tmp_path: Path) -> None:
    (tmp_path / "own_rewards.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import_objective("own_rewards:warmth")


@pytest.mark.parametrize("chosen", ["[a:score,b:score]", "[score,b:score]"])
def test_two_of_one_name_are_refused(chosen: str) -> None:
    with pytest.raises(ConfigError, match="objective has two that are called 'score'"):
        register_own_objectives([f"objective={chosen}"])


def test_a_dotted_name_is_told_the_way_of_writing_it(mavis: Any) -> None:
    ran = mavis("train", "objective=[own_rewards.warmth]", "output=run")
    assert ran.code == 2
    assert "objective has no option 'own_rewards.warmth'" in ran.err
    assert "Name one of your own as module:name." in ran.err
