"""What training tells while it goes on: the figures of its reports on one axis, whole even after it was broken off."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mavis.critics import HiddenStateCritic
from mavis.rollouts import RolloutSettings
from mavis.training import ImprovementSettings, improve
from mavis.training import DistillSettings, distill
from mavis.training.improvement.fit import FitSettings, RegressionSettings
from mavis.training.metrics import MetricLogger, record_training

EPOCHS = 3
SETTINGS = ImprovementSettings(
    iterations=2,
    rollouts=24,
    calibration_samples=0,
    sampling=RolloutSettings(max_new_tokens=6, top_k=None),
    fit=FitSettings(epochs=EPOCHS),
)
Told = list[tuple[dict[str, float], int]]


def improved(policy: Any, tokenizer: Any, objectives: Any, folder: Path) -> tuple[list[Any], Told, Any]:
    told: Told = []

    def log(values: Mapping[str, float], step: int) -> None:
        told.append((dict(values), step))

    critic = HiddenStateCritic.for_policy(policy, list(objectives), hidden=8, rank=4)
    reports = list(improve(policy, tokenizer, critic, objectives, ["the", "a dog"], folder, SETTINGS, log=log))
    return reports, told, critic


def test_every_figure_of_the_reports_is_told_on_one_axis(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    reports, told, critic = improved(tiny_policy, tiny_tokenizer, tiny_objectives, tmp_path / "run")
    expected: Told = []
    for report in reports:
        first = report.iteration * EPOCHS
        expected += [({"fit/held-out error": loss}, first + epoch) for epoch, loss in enumerate(report.losses) if epoch]
        groups = {"reward": report.rewards, "kl": report.kl, "goal": report.goal, "explained": report.explained}
        values = {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}
        expected.append(({name: value for name, value in values.items() if value is not None}, first + EPOCHS))
    assert told == expected
    assert [step for _, step in told] == sorted(step for _, step in told)
    # The critic's card knows how it was trained.
    training = critic.about["training"]
    assert (training["iterations"], training["fit.epochs"], training["prompts"]) == (2, EPOCHS, 2)

    # Trained anew, it is another critic: what was found out of the old one, and what that was trained on, is not its.
    critic.about |= {"efficiency": [{"weights": {"good": 1.0}, "kl": 1.0, "efficiency": 0.9}], "data": "others"}
    record_training(critic, tiny_policy, ["the"], SETTINGS)
    assert set(critic.about) == {"policy", "training"}
    assert critic.about["training"]["prompts"] == 1
    fresh = HiddenStateCritic.for_policy(tiny_policy, ["good"], hidden=8, rank=4)
    fresh.about["data"] = "prompts.txt"
    record_training(fresh, tiny_policy, ["the"], SETTINGS)
    assert fresh.about["data"] == "prompts.txt"

    # A run that goes on tells all of it again, and a finished one too.
    for lost in ("iteration-1/report.json", "iteration-1/critic", "critic"):
        path = tmp_path / "run" / lost
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for _ in range(2):
        _, again, _ = improved(tiny_policy, tiny_tokenizer, tiny_objectives, tmp_path / "run")
        assert again == told


def test_a_distillation_tells_its_errors_and_what_it_explains(
    tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Any, tmp_path: Path
) -> None:
    told: list[Told] = [[], []]
    settings = DistillSettings(
        rollouts=16,
        candidates=8,
        sampling=RolloutSettings(max_new_tokens=6, top_k=None),
        fit=RegressionSettings(epochs=2),
    )
    for times in told:
        student = HiddenStateCritic.for_policy(
            tiny_policy, ["good", "brevity"], hidden=8, rank=4, composition="independent"
        )
        report = distill(
            student,
            make_tiny_critic(),
            tiny_policy,
            tiny_tokenizer,
            ["the", "a dog"],
            tmp_path / "run",
            settings,
            log=lambda values, step, times=times: times.append((dict(values), step)),  # type: ignore[misc]
        )
    assert told[0] == told[1]
    assert told[0][:-1] == [({"fit/held-out error": loss}, epoch) for epoch, loss in enumerate(report.losses) if epoch]
    values, step = told[0][-1]
    assert step == 2
    assert values["explained/good"] == report.explained["good"]
    assert values["explained between candidates/brevity"] == report.between_candidates["brevity"]


def test_what_is_not_known_is_not_told() -> None:
    told: Told = []
    MetricLogger(lambda values, step: told.append((dict(values), step)), 4).log_groups(
        {"explained": {"a": None, "b": 0.5}}, 2
    )
    assert told == [({"explained/b": 0.5}, 12)]


@pytest.mark.parametrize("losses", [[], [1.0], [3.0, 2.0, 1.0]])
def test_a_fit_that_is_over_is_told_epoch_by_epoch(losses: list[float]) -> None:
    told: Told = []
    MetricLogger(lambda values, step: told.append((dict(values), step)), 5).errors(losses, 1)
    assert told == [({"fit/held-out error": loss}, 5 + epoch) for epoch, loss in enumerate(losses) if epoch]
