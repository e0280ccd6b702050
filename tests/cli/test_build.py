"""Objectives from a config: where their modules are found, hints about a `_target_`, and what a run records of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mavis.cli.build import MANIFEST, build_objectives, locked_run
from mavis.errors import ConfigError, DataError, ObjectiveError
from mavis.rewards import score
from mavis.utils.files import write_json

MODULE = """
def shout(prompts, responses):
    return [float(response.isupper()) for response in responses]

def one_argument(responses):
    return [0.0 for response in responses]
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of objectives, not yet on the path."""
    (tmp_path / "module_beside_the_run.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("module_beside_the_run", None)


def config(**options: Any) -> Any:
    return OmegaConf.create({"objectives": {"mine": options}})


def test_a_target_in_the_working_directory_is_found() -> None:
    objectives = build_objectives(config(_target_="module_beside_the_run.shout", _partial_=True))
    assert score(objectives, ["p", "p"], ["HEY", "hey"]).tolist() == [[1.0], [0.0]]


def test_installed_packages_come_before_modules_of_the_working_directory(working_directory: Path) -> None:
    build_objectives(config(_target_="module_beside_the_run.shout", _partial_=True))
    assert sys.path[-1] == str(working_directory)


def test_a_module_that_is_nowhere_is_refused_with_the_place_where_it_was_looked_for(working_directory: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objectives(config(_target_="module_that_is_not_there.shout", _partial_=True))
    assert "objective 'mine' cannot be built: " in str(caught.value)
    assert f"the module is looked for in {str(working_directory)!r} and among installed packages" in str(caught.value)


def test_a_function_without_partial_is_refused_with_the_line_to_add() -> None:
    with pytest.raises(ConfigError, match=r"objective 'mine' cannot be built: .* Hint: .*add `_partial_: true`"):
        build_objectives(config(_target_="module_beside_the_run.shout"))


def test_a_function_of_one_argument_is_refused_when_it_is_built() -> None:
    with pytest.raises(ObjectiveError, match=r"objective 'mine' takes the arguments \(responses\), but"):
        build_objectives(config(_target_="module_beside_the_run.one_argument", _partial_=True))


def test_a_mapping_without_a_target_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="objective 'mine' is a dict, which cannot be called"):
        build_objectives(config(scale=2.0))


def test_an_error_in_an_objective_ends_a_command_with_objective_and_line(
    mavis: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "broken_module.py").write_text("def broken(prompts, responses):\n    raise KeyError('lexicon')\n")
    broken = "+objectives.mine={_target_: broken_module.broken, _partial_: true}"
    ran = mavis("train", *small, broken)
    assert ran.code == 2
    assert "mavis: objective 'mine' raised KeyError: 'lexicon' for each of 4 responses tried alone, at " in ran.err
    assert "broken_module.py:2 in broken. Hint: " in ran.err


@pytest.mark.parametrize(
    ("stored", "given", "is_same"),
    [
        ({"template": "chat", "max_length": 512}, {"template": "auto", "max_length": None}, True),
        ({"template": "concat", "max_length": 512}, {"template": "concat", "max_length": None}, True),
        ({"template": "chat"}, {"template": "auto", "length_penalty": None}, True),
        ({"template": "concat", "max_length": 512}, {"template": "auto", "max_length": None}, False),
        ({"template": "chat", "max_length": 256}, {"template": "chat", "max_length": None}, False),
    ],
)
def test_runs_of_reward_models_resume_after_a_change_of_their_defaults(
    tmp_path: Path, stored: dict[str, Any], given: dict[str, Any], is_same: bool
) -> None:
    target = {"_target_": "mavis.rewards.RewardModel", "model": "somewhere"}
    write_json(tmp_path / MANIFEST, {"helpful": target | stored})
    (tmp_path / "iteration-0").mkdir()  # results
    (tmp_path / "iteration-0" / "report.json").write_text("{}")
    config = OmegaConf.create({"objectives": {"helpful": target | given}})
    with nullcontext() if is_same else pytest.raises(DataError, match="different objective settings: helpful"):
        with locked_run(config, ["helpful"], tmp_path):
            pass
