"""Metrics that training logs: one axis, complete even after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mavis.critics import HiddenStateCritic
from mavis.rollouts import RolloutSettings
from mavis.training import DistillSettings, ImprovementSettings, distill, improve
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
Logged = list[tuple[dict[str, float], int]]


def improved(policy: Any, tokenizer: Any, objectives: Any, folder: Path) -> tuple[list[Any], Logged, Any]:
    logged: Logged = []

    def log(values: Mapping[str, float], step: int) -> None:
        logged.append((dict(values), step))

    critic = HiddenStateCritic.for_policy(policy, list(objectives), hidden=8, rank=4)
    reports = list(improve(policy, tokenizer, critic, objectives, ["the", "a dog"], folder, SETTINGS, log=log))
    return reports, logged, critic


def test_all_metrics_of_the_reports_are_logged_on_one_axis(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    reports, logged, critic = improved(tiny_policy, tiny_tokenizer, tiny_objectives, tmp_path / "run")
    expected: Logged = []
    for report in reports:
        first = report.iteration * EPOCHS
        expected += [({"fit/held-out error": loss}, first + epoch) for epoch, loss in enumerate(report.losses) if epoch]
        groups = {"reward": report.rewards, "kl": report.kl, "goal": report.goal, "explained": report.explained}
        values = {f"{group}/{name}": value for group, metrics in groups.items() for name, value in metrics.items()}
        expected.append(({name: value for name, value in values.items() if value is not None}, first + EPOCHS))
    assert logged == expected
    assert [step for _, step in logged] == sorted(step for _, step in logged)
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

    # A resumed run logs all of it again, and so does a finished one.
    for lost in ("iteration-1/report.json", "iteration-1/critic", "critic"):
        path = tmp_path / "run" / lost
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for _ in range(2):
        _, again, _ = improved(tiny_policy, tiny_tokenizer, tiny_objectives, tmp_path / "run")
        assert again == logged


def test_a_distillation_logs_its_errors_and_explained_shares(
    tiny_policy: Any, tiny_tokenizer: Any, make_tiny_critic: Any, tmp_path: Path
) -> None:
    logged: list[Logged] = [[], []]
    settings = DistillSettings(
        rollouts=16,
        candidates=8,
        sampling=RolloutSettings(max_new_tokens=6, top_k=None),
        fit=RegressionSettings(epochs=2),
    )
    for times in logged:
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
    assert logged[0] == logged[1]
    assert logged[0][:-1] == [
        ({"fit/held-out error": loss}, epoch) for epoch, loss in enumerate(report.losses) if epoch
    ]
    values, step = logged[0][-1]
    assert step == 2
    assert values["explained/good"] == report.explained["good"]
    assert values["explained between candidates/brevity"] == report.between_candidates["brevity"]


def test_metrics_that_are_none_are_not_logged() -> None:
    logged: Logged = []
    MetricLogger(lambda values, step: logged.append((dict(values), step)), 4).log_groups(
        {"explained": {"a": None, "b": 0.5}}, 2
    )
    assert logged == [({"explained/b": 0.5}, 12)]


@pytest.mark.parametrize("losses", [[], [1.0], [3.0, 2.0, 1.0]])
def test_a_finished_fit_is_logged_epoch_by_epoch(losses: list[float]) -> None:
    logged: Logged = []
    MetricLogger(lambda values, step: logged.append((dict(values), step)), 5).errors(losses, 1)
    assert logged == [({"fit/held-out error": loss}, 5 + epoch) for epoch, loss in enumerate(losses) if epoch]
