"""Several critics on the command line: `checkpoint=[one,another]` in the commands that use critics."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mavis.cli.build import load_critic
from mavis.critics import CriticGroup, HiddenStateCritic
from mavis.errors import ConfigError

BOTH = "checkpoint=[one/critic,two/critic]"
DECODING = ("policy=tiny", "decoding.max_new_tokens=6", "decoding.top_k=20")


@pytest.fixture
def critics(tiny_policy: Any, tmp_path: Path) -> list[HiddenStateCritic]:
    """A critic of `positive` in the folder `one`, and one of `brevity` in `two`."""
    saved = []
    for seed, (folder, name) in enumerate({"one": "positive", "two": "brevity"}.items()):
        critic = HiddenStateCritic.for_policy(
            tiny_policy, [name], hidden=4, rank=2, composition="independent", seed=seed
        )
        critic.save_pretrained(tmp_path / folder / "critic")
        saved.append(critic)
    return saved


def test_a_list_of_folders_is_a_group_and_a_single_one_a_critic(critics: Any, tmp_path: Path) -> None:
    folders = [str(tmp_path / "one" / "critic"), str(tmp_path / "two" / "critic")]
    group = load_critic(folders)
    assert isinstance(group, CriticGroup)
    assert group.objectives == ("positive", "brevity")
    for single in (folders[1], folders[1:]):
        assert isinstance(load_critic(single), HiddenStateCritic)


@pytest.mark.parametrize("checkpoint", [None, [], "", 3, ["outputs/one", None]])
def test_what_names_no_critic_is_refused(checkpoint: Any) -> None:
    with pytest.raises(ConfigError, match="checkpoint is .*, expected a critic's folder or a list of them. Hint"):
        load_critic(checkpoint)


def test_generate_weighs_the_objectives_of_all(mavis: Any, critics: Any) -> None:
    ran = mavis("generate", *DECODING, BOTH, "beta=2", "weights={positive: 1, brevity: -0.5}", "prompt=the dog")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("the dog")


def test_evaluate_reports_the_objectives_of_all_and_changes_no_model_card(
    mavis: Any, critics: Any, tmp_path: Path
) -> None:
    card = (tmp_path / "one" / "critic" / "README.md").read_text()
    small = ("evaluation.samples=2", "evaluation.reference_samples=4", "evaluation.betas=[1]", "evaluation.divisions=1")
    prompts = ("data=file", "data.prompts.source=[once]", "data.evaluation_prompts.source=[the dog,she said]")
    options = ("evaluation.speed_repeats=0", "objective=[positive,brevity]", "output=report")
    ran = mavis("evaluate", *DECODING, BOTH, *small, *prompts, *options)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["objectives"] == ["positive", "brevity"]
    assert {value["objective"] for value in report["values"]} == {"positive", "brevity"}
    assert (tmp_path / "one" / "critic" / "README.md").read_text() == card


def test_elicit_asks_about_the_objectives_of_all_and_names_all_in_the_next_command(mavis: Any, critics: Any) -> None:
    room = ("objective=[positive,brevity]", "beta=3", "prompts=2", "questions=2", "output=out")
    ran = mavis("elicit", *DECODING, BOTH, *room, stdin="1\n2\n")
    assert ran.code == 0, ran.err
    _, *command = shlex.split(ran.out.strip().splitlines()[-1])
    assert BOTH in command
    again = mavis(*command)
    assert again.code == 0, again.err
