"""DeepSpeed: two processes train the critic of one, with or without sharded weights, over several iterations."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mavis.critics import Critic
from mavis.errors import ConfigError
from mavis.training.accelerate_session import configure_deepspeed
from mavis.utils.files import read_json

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

CRITICS = {
    "hidden state": ("critic.memory=4", "improvement=conditioned"),
    "value model": ("critic=value_model", "+critic.backbone=null"),
}
# Three shards for two processes, so that one has nothing to do while the other samples.
SMALL = (
    "improvement.rollouts=32",
    "improvement.shard_size=12",
    "improvement.fit.epochs=2",
    "improvement.calibration_samples=0",
)


def outcome(process: Any) -> str:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    return str(errors)


@pytest.fixture(scope="module")
def alone(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("alone")
    runs = {name: train("alone", where, *options, *SMALL, f"output={name}") for name, options in CRITICS.items()}
    for process in runs.values():
        outcome(process)
    return {name: where / name for name in runs}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [("2", "value model"), ("3", "hidden state"), ("3", "value model")],
)
def test_the_critic_is_that_of_one_process(
    train: Callable[..., Any], alone: dict[str, Path], tmp_path: Path, stage: str, name: str
) -> None:
    outcome(train(f"deepspeed {stage}", tmp_path, *CRITICS[name], *SMALL, "output=run"))
    for iteration in range(2):
        found, expected = (
            read_json(run / f"iteration-{iteration}" / "report.json") for run in (tmp_path / "run", alone[name])
        )
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert len(set(expected["losses"])) == 3
    folders = tmp_path / "run" / "critic", alone[name] / "critic", alone[name] / "start"
    trained, one, start = (Critic.from_pretrained(folder).state_dict() for folder in folders)
    assert trained.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(trained[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert any(not torch.allclose(start[key], value, atol=2e-3) for key, value in one.items() if "heads" in key)


def test_weights_in_half_precision_are_refused() -> None:
    accelerate = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object()), mixed_precision="bf16")
    with pytest.raises(
        ConfigError, match="mixed_precision is 'bf16', under which DeepSpeed.*set mixed_precision to no"
    ):
        configure_deepspeed(accelerate)


def test_an_optimiser_in_its_configuration_is_refused() -> None:
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {}})
    accelerate = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="no")
    with pytest.raises(ConfigError, match="has an entry 'optimizer', but a fit brings its own"):
        configure_deepspeed(accelerate)


@pytest.mark.slow
def test_what_a_fit_refuses_is_refused_before_anything_is_sampled(train: Callable[..., Any], tmp_path: Path) -> None:
    process = train("deepspeed 2 --mixed_precision bf16", tmp_path, *SMALL, "output=run")
    output, errors = process.communicate(timeout=400)
    assert process.returncode != 0
    assert "mixed_precision is 'bf16'" in output + errors
    assert not (tmp_path / "run" / "iteration-0").exists()
