"""The folder of a run: one run at a time, and no claim on it before there are results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.errors import DataError, ObjectiveError
from mavis.rewards import Brevity
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.training import (
    AlignSettings,
    DistillSettings,
    FitSettings,
    ImprovementSettings,
    RegressionSettings,
    align,
    distill,
    improve,
)
from mavis.training.run_folder import read_report
from mavis.utils.files import write_json
from tests.lock_holder import locked_elsewhere

PROMPTS = ["Once upon a time", "The dog"]
SAMPLING = RolloutSettings(max_new_tokens=4, shard_size=4)


@pytest.fixture(scope="module")
def policy_and_tokenizer() -> tuple[Any, Any]:
    return mavis.embedded.load()


def new_critic(policy: Any) -> mavis.HiddenStateCritic:
    return mavis.HiddenStateCritic.for_policy(policy, ["short"], hidden=8, composition="independent")


def run_collect(policy: Any, tokenizer: Any, folder: Path, objective: Any, length: int = 4) -> Any:
    settings = RolloutSettings(max_new_tokens=length, shard_size=4)
    plan = RolloutPlan.reference(PROMPTS, objectives=1)
    return list(collect(policy, tokenizer, {"short": objective}, plan, folder, settings))


def run_improve(policy: Any, tokenizer: Any, folder: Path, objective: Any, length: int = 4) -> Any:
    settings = ImprovementSettings(
        iterations=1,
        rollouts=8,
        composition="independent",
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=length, shard_size=4),
        fit=FitSettings(epochs=1),
    )
    return list(improve(policy, tokenizer, new_critic(policy), {"short": objective}, PROMPTS, folder, settings))


def run_distill(policy: Any, tokenizer: Any, folder: Path, objective: Any, length: int = 4) -> Any:
    settings = DistillSettings(rollouts=4, sampling=SAMPLING, fit=RegressionSettings(epochs=1))
    return distill(new_critic(policy), new_critic(policy), policy, tokenizer, PROMPTS, folder, settings)


def run_align(policy: Any, tokenizer: Any, folder: Path, objective: Any, length: int = 4) -> Any:
    settings = AlignSettings(steps=0, reference_samples=8, evaluation_samples=2, max_new_tokens=length)
    return align(policy, tokenizer, {"short": objective}, [1.0], PROMPTS, folder, settings)


RUNS: list[Callable[..., Any]] = [run_collect, run_improve, run_distill, run_align]


@pytest.mark.parametrize("run", RUNS)
def test_two_runs_cannot_share_a_folder(
    policy_and_tokenizer: tuple[Any, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    with locked_elsewhere(tmp_path), pytest.raises(DataError, match=f"folder '{tmp_path}' is in use by process"):
        run(*policy_and_tokenizer, tmp_path, Brevity())
    run(*policy_and_tokenizer, tmp_path, Brevity())
    assert not list(tmp_path.rglob(".mavis*"))


@pytest.mark.parametrize("run", [run_improve, run_distill, run_align])
def test_no_run_is_started_in_the_folder_of_a_critic(
    policy_and_tokenizer: tuple[Any, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    new_critic(policy_and_tokenizer[0]).save_pretrained(tmp_path / "critic")
    before = sorted(path.name for path in (tmp_path / "critic").iterdir())
    with pytest.raises(DataError, match="critic' holds a critic or a model; a run in it would be lost"):
        run(*policy_and_tokenizer, tmp_path / "critic", Brevity())
    assert sorted(path.name for path in (tmp_path / "critic").iterdir()) == before


def test_a_finished_run_keeps_what_an_evaluation_has_measured(
    policy_and_tokenizer: tuple[Any, Any], tmp_path: Path
) -> None:
    run_improve(*policy_and_tokenizer, tmp_path, Brevity())
    critic = mavis.Critic.from_pretrained(tmp_path / "critic")
    critic.about["efficiency"] = measured = [{"weights": {"short": 1.0}, "kl": 1.0, "efficiency": 0.5}]
    critic.save_pretrained(tmp_path / "critic")
    run_improve(*policy_and_tokenizer, tmp_path, Brevity())
    assert mavis.Critic.from_pretrained(tmp_path / "critic").about["efficiency"] == measured


def test_finished_rollouts_are_read_while_another_run_reads_them(
    policy_and_tokenizer: tuple[Any, Any], tmp_path: Path
) -> None:
    sampled = run_collect(*policy_and_tokenizer, tmp_path, Brevity())
    with locked_elsewhere(tmp_path):
        read = run_collect(*policy_and_tokenizer, tmp_path, Brevity())
    assert [shard[:] for shard in read] == [shard[:] for shard in sampled]


def test_an_iterator_left_suspended_does_not_keep_out_its_own_program(
    policy_and_tokenizer: tuple[Any, Any], tmp_path: Path
) -> None:
    plan = RolloutPlan.reference(PROMPTS * 3, objectives=1)
    rollouts = collect(*policy_and_tokenizer, {"short": Brevity()}, plan, tmp_path / "rollouts", SAMPLING)
    first = next(rollouts)
    again = list(collect(*policy_and_tokenizer, {"short": Brevity()}, plan, tmp_path / "rollouts", SAMPLING))
    assert again[0].to_dict() == first.to_dict()
    assert [shard.to_dict() for shard in rollouts] == [again[1].to_dict()]

    settings = ImprovementSettings(
        iterations=1, rollouts=8, composition="independent", calibration_samples=0, sampling=SAMPLING
    )
    arguments = {"short": Brevity()}, PROMPTS, tmp_path / "run", settings
    suspended = improve(*policy_and_tokenizer, new_critic(policy_and_tokenizer[0]), *arguments)
    report = next(suspended)
    assert list(improve(*policy_and_tokenizer, new_critic(policy_and_tokenizer[0]), *arguments)) == [report]
    suspended.close()
    assert not list(tmp_path.rglob(".mavis*"))


@pytest.mark.parametrize("run", [run_collect, run_improve, run_align])
def test_a_run_that_failed_before_its_first_results_claims_nothing(
    policy_and_tokenizer: tuple[Any, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    def broken(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        raise ObjectiveError("max_length is 1000000.", "use less.")

    with pytest.raises(ObjectiveError, match="max_length"):
        run(*policy_and_tokenizer, tmp_path, broken)
    run(*policy_and_tokenizer, tmp_path, Brevity(), length=5)
    with pytest.raises(DataError, match="holds .* with different"):
        run(*policy_and_tokenizer, tmp_path, Brevity(), length=6)


def run_iterations(policy: Any, tokenizer: Any, folder: Path, iterations: int, beta: float = 4.0) -> dict[str, Any]:
    critic = new_critic(policy)
    settings = ImprovementSettings(
        iterations=iterations,
        rollouts=8,
        beta=beta,
        composition="independent",
        calibration_samples=1,
        sampling=SAMPLING,
        fit=FitSettings(epochs=1),
    )
    list(improve(policy, tokenizer, critic, {"short": Brevity()}, PROMPTS, folder, settings))
    return mavis.Critic.from_pretrained(folder / "critic").state_dict() | {"calibration": critic.calibration}


def test_a_finished_run_with_one_more_iteration_ends_as_if_it_had_been_asked_for_at_once(
    policy_and_tokenizer: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_iterations(*policy_and_tokenizer, tmp_path / "run", 1)
    continued = run_iterations(*policy_and_tokenizer, tmp_path / "run", 2)
    assert f"finished run in {tmp_path / 'run'} continued" in capsys.readouterr().err
    at_once = run_iterations(*policy_and_tokenizer, tmp_path / "at once", 2)
    assert continued.keys() == at_once.keys()
    for name, value in at_once.items():
        assert torch.equal(continued[name], value) if isinstance(value, torch.Tensor) else continued[name] == value
    assert (tmp_path / "run" / "run.json").read_text() == (tmp_path / "at once" / "run.json").read_text()


@pytest.mark.parametrize(("iterations", "beta"), [(1, 4.0), (3, 2.0)])
def test_fewer_iterations_and_other_settings_are_refused(
    policy_and_tokenizer: tuple[Any, Any], tmp_path: Path, iterations: int, beta: float
) -> None:
    run_iterations(*policy_and_tokenizer, tmp_path, 2)
    with pytest.raises(DataError, match=r"holds a run with different settings\."):
        run_iterations(*policy_and_tokenizer, tmp_path, iterations, beta)
    run_iterations(*policy_and_tokenizer, tmp_path, 2)


@dataclass(frozen=True)
class Found:
    folder: str


@pytest.mark.parametrize("stored", ["model", "runs/first/model", "/somewhere/else/model"])
def test_the_folder_of_a_report_is_in_its_run_wherever_the_run_was(tmp_path: Path, stored: str) -> None:
    write_json(tmp_path / "report.json", {"folder": stored})
    assert read_report(tmp_path / "report.json", Found).folder == str(tmp_path / "model")
