"""The Hydra tree: every choice composes, and what users choose replaces what was there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from mavis.cli import COMMANDS
from mavis.cli.build import distill_settings, evaluation_settings, improvement_settings, rollout_settings
from mavis.cli.conf_dir import conf_dir
from mavis.evaluation import EvaluationSettings
from mavis.rollouts import RolloutSettings
from mavis.training import DistillSettings, FitSettings, ImprovementSettings

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"  # which extends Hydra's own groups
}
TRAINING = {"policy", "critic", "objective", "data", "decoding", "improvement", "sampler", "experiment", "launcher"}
USES = {
    "train": TRAINING,
    "distill": {"policy", "critic", "data", "decoding", "launcher"},
    "search": TRAINING | {"evaluation"},
    "evaluate": {"policy", "objective", "data", "decoding", "evaluation", "experiment", "launcher"},
    "generate": {"policy", "objective", "decoding"},
    "info": set(),
    "chat": {"policy", "decoding"},
    "elicit": {"policy", "objective", "data", "decoding"},
    "align": {"policy", "objective", "data", "launcher"},
    "train-reward": {"policy", "launcher"},
    "demo": TRAINING | {"evaluation"},
}
CHOICES = [
    (command, group, option) for command, groups in USES.items() for group in sorted(groups) for option in GROUPS[group]
]


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def resolved(config: DictConfig) -> dict[str, object]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def test_the_tree_is_found_in_a_clone() -> None:
    assert Path(conf_dir()) == CONF


def test_every_command_has_a_config_and_every_config_a_command() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(COMMANDS)


def test_every_group_is_used_by_a_command() -> None:
    assert set().union(*USES.values()) == set(GROUPS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_config_composes(command: str) -> None:
    assert resolved(compose(command))


@pytest.mark.parametrize(("command", "group", "option"), CHOICES)
def test_every_option_of_every_group_composes(command: str, group: str, option: str) -> None:
    value = f"[{option}]" if group == "objective" else option
    assert resolved(compose(command, [f"{group}={value}"]))


@pytest.mark.parametrize("command", ["train", "search", "demo"])
def test_two_objectives_are_the_default(command: str) -> None:
    assert list(compose(command).objectives) == ["positive", "dialogue"]


@pytest.mark.parametrize("command", ["evaluate", "elicit", "generate"])
def test_commands_that_use_a_critic_choose_no_objectives(command: str) -> None:
    assert compose(command).get("objectives") is None


@pytest.mark.parametrize("command", ["train", "search", "evaluate", "elicit", "demo"])
def test_chosen_objectives_replace_the_default(command: str) -> None:
    assert list(compose(command, ["objective=[brevity]"]).objectives) == ["brevity"]
    assert list(compose(command, ["objective=brevity"]).objectives) == ["brevity"]
    assert list(compose(command, ["objective=[dialogue,brevity,positive]"]).objectives) == [
        "dialogue",
        "brevity",
        "positive",
    ]


def launcher_of(command: str, *overrides: str) -> DictConfig:
    return compose(command, list(overrides), return_hydra_config=True).hydra.launcher


@pytest.mark.parametrize("command", [command for command, groups in USES.items() if "launcher" in groups])
def test_a_launcher_is_the_one_of_its_plugin(command: str) -> None:
    assert launcher_of(command)._target_.endswith(".BasicLauncher")
    assert launcher_of(command, "launcher=joblib")._target_.endswith(".JoblibLauncher")
    assert launcher_of(command, "launcher=submitit_local")._target_.endswith(".LocalLauncher")
    slurm = launcher_of(command, "launcher=submitit", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1")
    assert slurm._target_.endswith(".SlurmLauncher")
    assert (slurm.partition, slurm.gpus_per_node) == ("gpu", 1)
    assert slurm.max_num_timeout > 0  # a requeued run resumes


def test_an_objectives_options_can_be_set() -> None:
    config = compose("train", ["objective=[brevity]", "objectives.brevity.scale=7"])
    assert config.objectives.brevity.scale == 7


def test_weights_are_those_asked_for_and_no_others() -> None:
    assert compose("generate").weights is None
    assert compose("generate", ["weights={positive: 0.8}"]).weights == {"positive": 0.8}
    assert compose("generate", ["weights={a: 1, b: -0.5}"]).weights == {"a": 1, "b": -0.5}
    assert compose("generate", ["weights=[0.5,0.5]"]).weights == [0.5, 0.5]
    assert compose("generate", ["vectors={outputs/v-1.0: -0.5, /b_2: 1}"]).vectors == {"outputs/v-1.0": -0.5, "/b_2": 1}


def test_lists_are_replaced_and_not_joined() -> None:
    config = compose("evaluate", ["evaluation.betas=[9.0]", "data.evaluation_prompts.source=[Once, Twice]"])
    assert config.evaluation.betas == [9.0]
    assert config.data.evaluation_prompts.source == ["Once", "Twice"]


def test_another_source_of_prompts_keeps_nothing_of_the_openings() -> None:
    files = ["data=file", "data.prompts.source=a.txt", "data.evaluation_prompts.source=b.txt"]
    data = compose("train", files).data
    assert data.prompts.source == "a.txt"
    assert data.evaluation_prompts.source == "b.txt"


def test_the_held_out_objective_can_be_left_out_or_replaced() -> None:
    assert list(compose("evaluate").evaluation.held_out) == ["readability"]
    assert not compose("evaluate", ["~evaluation.held_out.readability"]).evaluation.held_out
    replaced = ["~evaluation.held_out.readability", "+evaluation.held_out.brevity._target_=mavis.rewards.Brevity"]
    assert list(compose("evaluate", replaced).evaluation.held_out) == ["brevity"]


@pytest.mark.parametrize(
    ("command", "override", "key"),
    [
        ("train", "improvment.rollouts=3", "improvment"),
        ("train", "improvement.rolouts=3", "rolouts"),
        ("train", "critic.hiden=8", "hiden"),
        ("distill", "distillation.candidate=3", "candidate"),
        ("evaluate", "evaluation.sampels=3", "sampels"),
        ("generate", "promt=Once", "promt"),
        ("demo", "betta=3", "betta"),
    ],
)
def test_a_misspelt_key_is_refused_by_name(command: str, override: str, key: str) -> None:
    with pytest.raises(ConfigCompositionException) as raised:
        compose(command, [override])
    assert f"Key '{key}' is not in struct" in str(raised.value.__cause__)


def test_a_misspelt_option_is_refused_by_name() -> None:
    with pytest.raises(MissingConfigException, match="Could not load 'objective/positiv'"):
        compose("train", ["objective=[positiv]"])


@pytest.mark.parametrize("command", ["train", "demo"])
@pytest.mark.parametrize("improvement", GROUPS["improvement"])
def test_every_improvement_group_builds_settings_from_all_its_keys(command: str, improvement: str) -> None:
    config = compose(command, [f"improvement={improvement}"])
    assert isinstance(improvement_settings(config), ImprovementSettings)
    assert set(config.improvement.fit) == {field.name for field in fields(FitSettings)}
    elsewhere = {"beta", "sampling"}
    assert set(config.improvement) - {"shard_size"} == {field.name for field in fields(ImprovementSettings)} - elsewhere


def test_the_papers_recipes_differ_only_in_the_price_of_kl() -> None:
    paper, sound = (improvement_settings(compose("train", [f"experiment={name}"])) for name in ("paper", "paper_sound"))
    assert (paper.kl_label, paper.zeta) == ("whole_response", 0.02)
    assert (sound.kl_label, sound.resolved().zeta) == ("to_come", 1 / sound.beta)
    assert replace(paper, kl_label="to_come", zeta=None) == sound
    assert (sound.composition, sound.fit.target, sound.reuse) == ("independent", "monte_carlo", False)
    assert (sound.sampling.top_k, sound.sampling.min_new_tokens) == (40, 1)


@pytest.mark.parametrize("evaluation", GROUPS["evaluation"])
def test_every_evaluation_group_builds_settings_from_all_its_keys(evaluation: str) -> None:
    config = compose("demo", [f"evaluation={evaluation}"])
    assert isinstance(evaluation_settings(config), EvaluationSettings)
    known = {field.name for field in fields(EvaluationSettings)} - {"sampling"}
    assert set(config.evaluation) - {"shard_size", "held_out"} == known


def test_the_settings_that_commands_build_are_the_defaults() -> None:
    assert improvement_settings(compose("train")) == ImprovementSettings()
    assert distill_settings(compose("distill")) == DistillSettings()
    assert rollout_settings(compose("train"), RolloutSettings().shard_size) == RolloutSettings()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_repeats_what_all_commands_share(command: str) -> None:
    own = OmegaConf.load(CONF / f"{command}.yaml").hydra
    assert set(own) <= {"job", "help", "run", "mode", "sweeper"}
    assert list(own.job) == ["name"]
    assert list(own.help) == ["header"]
    assert own.job.name == command
    assert ("run" in own) == (command == "elicit")  # which alone writes to a folder and is no sweep
    assert ("sweeper" in own) == (command == "search")
