"""Every file of conf/objective composes, and what it builds scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from mavis.rewards import RewardModel, score

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
REWARD_MODELS = ["humour", "reward_model", "summary"]
LEXICAL = [name for name in NAMES if name not in REWARD_MODELS]


@pytest.fixture(autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose(overrides=list(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_lands_under_its_own_name(name: str) -> None:
    config = composed(f"+objective={name}")
    assert list(config) == ["objectives"]
    assert list(config.objectives) == [name]
    assert "_target_" in config.objectives[name]


@pytest.mark.parametrize("name", LEXICAL)
def test_a_lexical_objective_scores(name: str) -> None:
    objectives: Any = instantiate(composed(f"+objective={name}").objectives)
    rewards = score(objectives, ["Once", "Once"], ['"Good!" she said happily.', ""])
    assert rewards[0] != rewards[1]


def test_several_compose_in_the_order_of_the_list() -> None:
    config = composed("+objective=[dialogue,positive,brevity]", "objectives.brevity.scale=10")
    assert list(config.objectives) == ["dialogue", "positive", "brevity"]
    for convert in ("none", "all"):
        objectives: Any = instantiate(config.objectives, _convert_=convert)
        assert list(objectives) == ["dialogue", "positive", "brevity"]
        rewards = score(objectives, ["p"], ['"good"'])[0]
        assert rewards.tolist() == pytest.approx([1.0, 0.4404, -0.1])


def test_negative_is_the_opposite_of_positive() -> None:
    objectives: Any = instantiate(composed("+objective=[positive,negative]").objectives)
    rewards = score(objectives, ["p"], ["a good day"])[0]
    assert rewards[0] == -rewards[1] != 0


@pytest.mark.parametrize(("name", "labels", "text"), [("humour", 2, "c d"), ("summary", 1, "c d <eos> a b")])
def test_a_reward_model_reads_what_it_was_trained_on(make_folder: Any, name: str, labels: int, text: str) -> None:
    overrides = [f"objectives.{name}.model={make_folder(labels=labels, bos_token='<eos>')}"]
    overrides += [f"objectives.{name}.max_length=512"]
    objectives: Any = instantiate(composed(f"+objective={name}", *overrides).objectives)
    plain = RewardModel(objectives[name].model, template="concat", output=labels - 1)
    assert score(objectives, ["a b"], ["c d"]) == score({"plain": plain}, [""], [text])


def test_a_reward_model_must_be_named() -> None:
    config = composed("+objective=reward_model")
    with pytest.raises(MissingMandatoryValue):
        _ = config.objectives.reward_model.model


def test_two_reward_models_under_names_of_their_own(make_folder: Any) -> None:
    folder = make_folder(labels=2)
    config = composed(
        "+objective=[positive]",
        "+objective@objectives.helpful=reward_model",
        "+objective@objectives.cost=reward_model",
        f"objectives.helpful.model={folder}",
        "objectives.helpful.template=concat",
        "objectives.helpful.output=[1,0]",
        f"objectives.cost.model={folder}",
        "objectives.cost.template=concat",
        "objectives.cost.output=[1,0]",
        "objectives.cost.sign=-1",
    )
    objectives: Any = instantiate(config.objectives)
    assert list(objectives) == ["positive", "helpful", "cost"]
    rewards = score(objectives, ["a ", "b "], ["c d", "e"])
    assert (rewards[:, 1] == -rewards[:, 2]).all()
    assert rewards[0, 1] != rewards[1, 1]
