"""The objectives that a critic was trained for: found beside it, and not exchanged for others of the same name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mavis.cli.known_objectives import add_known_objectives
from mavis.errors import ConfigError
from tests.cli.conftest import EVALUATION


@pytest.fixture
def scaled(mavis: Any, small: tuple[str, ...], trained: Path, tmp_path: Path) -> Path:
    """The critic of a run whose objective has an option that does not ship."""
    ran = mavis("train", *small, "objectives.brevity.scale=10", "output=run")
    assert ran.code == 0, ran.err
    return tmp_path / "run" / "critic"


def test_evaluate_takes_the_objectives_of_the_run(mavis: Any, scaled: Path, tmp_path: Path) -> None:
    ran = mavis("evaluate", "policy=tiny", f"checkpoint={scaled}", *EVALUATION)
    assert ran.code == 0, ran.err
    assert f"objectives positive, brevity as in {tmp_path / 'run' / 'objectives.json'}" in ran.err
    used = json.loads((tmp_path / "report" / "rollouts" / "objectives.json").read_text())
    assert used == json.loads((tmp_path / "run" / "objectives.json").read_text())
    assert used["brevity"]["scale"] == 10


def test_elicit_takes_the_objectives_of_the_run(mavis: Any, scaled: Path, tmp_path: Path) -> None:
    ran = mavis(
        "elicit", "policy=tiny", f"checkpoint={scaled}", "questions=1", "prompts=2", "output=asked", stdin="1\n"
    )
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "asked" / "objectives.json").read_text())["brevity"]["scale"] == 10


@pytest.mark.parametrize("command", ["evaluate", "elicit"])
def test_others_of_the_same_name_are_refused(mavis: Any, trained: Path, tmp_path: Path, command: str) -> None:
    other = ("objective=[positive,brevity]", "objectives.brevity.scale=7")
    ran = mavis(command, "policy=tiny", f"checkpoint={trained}", *other, "output=report")
    assert ran.code == 2
    assert f"the objective 'brevity' is not the one that the critic in '{trained.parent}' was trained for" in ran.err
    assert "Hint: leave out objective=" in ran.err


def test_a_function_that_has_changed_since_is_refused(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [item for item in small if not item.startswith("objective=")]
    module = tmp_path / "changing_rewards.py"
    code = "def shout(prompts, responses):\n    return [float(response.count('{}')) for response in responses]\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module.write_text(code.format("a"))
    assert mavis("train", *others, "objective=[changing_rewards:shout]", "output=run").code == 0
    monkeypatch.delitem(sys.modules, "changing_rewards")
    module.write_text(code.format("e"))
    ran = mavis("evaluate", "policy=tiny", "checkpoint=run/critic", *EVALUATION)
    assert ran.code == 2
    assert "trained for changing_rewards:shout, which is code outside mavis. Hint: if it is yours, name it" in ran.err
    named = "objective=[changing_rewards:shout]"
    ran = mavis("evaluate", "policy=tiny", "checkpoint=run/critic", named, *EVALUATION)
    assert ran.code == 2
    assert "the objective 'shout' is not the one that the critic in" in ran.err
    module.write_text(code.format("a"))
    monkeypatch.delitem(sys.modules, "changing_rewards")
    assert mavis("evaluate", "policy=tiny", "checkpoint=run/critic", named, *EVALUATION).code == 0


TOUCH = ["touch", "made"]


@pytest.mark.parametrize(
    "spec",
    [
        {"_target_": "os.system", "command": "touch made"},
        {
            "_target_": "mavis.cli.own_objectives.import_objective",
            "source": "subprocess:Popen",
            "args": ["touch", "made"],
        },
        {"_target_": "mavis.rewards.Signed", "objective": {"_target_": "os.system", "command": "touch made"}},
        {
            "_target_": "mavis.rewards.Positive",
            "_partial_": True,
            "more": {"_target_": "os.system", "command": "touch made"},
        },
    ],
)
def test_a_folder_does_not_choose_what_code_runs(
    mavis: Any, trained: Path, tmp_path: Path, spec: dict[str, Any]
) -> None:
    shutil.copytree(trained, tmp_path / "shared" / "critic")
    (tmp_path / "shared" / "objectives.json").write_text(json.dumps({"positive": spec}))
    mavis("evaluate", "policy=tiny", "checkpoint=shared/critic", *EVALUATION)
    assert not (tmp_path / "made").exists()


def test_a_critic_without_its_run_takes_the_objectives_that_ship(mavis: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "alone" / "critic")
    ran = mavis("evaluate", "policy=tiny", "checkpoint=alone/critic", *EVALUATION)
    assert ran.code == 0, ran.err
    assert "objectives positive, brevity as they ship with mavis" in ran.err


@pytest.mark.parametrize("name", ["warmth", "reward_model", "../objective/brevity"])
def test_an_objective_that_nothing_describes_is_asked_for(name: str, tmp_path: Path) -> None:
    config = OmegaConf.create({})
    OmegaConf.set_struct(config, True)
    with pytest.raises(ConfigError, match="nothing beside the critic says what its objective is: ") as refused:
        add_known_objectives(config, [str(tmp_path)], [name])
    assert refused.value.hint.startswith(f"name them: objective=[{name}]")


def test_several_critics_bring_the_objectives_of_their_own_runs(
    mavis: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    others = [item for item in small if not item.startswith("objective=")]
    assert mavis("train", *others, "objective=[brevity]", "objectives.brevity.scale=10", "output=one").code == 0
    assert mavis("train", *others, "objective=[positive]", "output=two").code == 0
    ran = mavis("evaluate", "policy=tiny", "checkpoint=[one/critic,two/critic]", *EVALUATION)
    assert ran.code == 0, ran.err
    used = json.loads((tmp_path / "report" / "rollouts" / "objectives.json").read_text())
    assert list(used) == ["brevity", "positive"]
    assert used["brevity"]["scale"] == 10
