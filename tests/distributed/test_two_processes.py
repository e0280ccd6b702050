"""Two processes match one: every prompt once, the same gradient, the same critic."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mavis.critics import Critic

pytestmark = pytest.mark.slow


@dataclass
class Job:
    """What each process of a job has written, and their common folder."""

    folder: Path
    facts: list[dict[str, Any]]
    tensors: list[dict[str, Tensor]]

    @classmethod
    def of(cls, folder: Path, count: int) -> Job:
        return cls(
            folder,
            [json.loads((folder / f"{index}.json").read_text()) for index in range(count)],
            [load_file(folder / f"{index}.safetensors") for index in range(count)],
        )


@pytest.fixture(scope="module")
def alone(job: Callable[..., Path]) -> Job:
    return Job.of(job("alone"), 1)


@pytest.fixture(scope="module")
def together(job: Callable[..., Path]) -> Job:
    return Job.of(job("torchrun"), 2)


def rows(folder: Path) -> dict[str, list[Any]]:
    shards = [datasets.load_from_disk(str(path)) for path in sorted(folder.glob("shard-*"))]
    return {name: [value for shard in shards for value in shard[name]] for name in shards[0].column_names}


def assert_close(found: Any, expected: Any, name: str) -> None:
    """Compare metrics by name or in a list; None must be None in both."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), name
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert [x is None for x in found] == [x is None for x in expected], name
        found, expected = ([x for x in metrics if x is not None] for metrics in (found, expected))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    else:
        assert found == expected, name


def test_collectives_agree_in_all_processes(together: Job) -> None:
    one, other = (facts["collectives"] for facts in together.facts)
    assert one["total"] == other["total"] == [3.0, 4.0]
    assert one["of_main"] == other["of_main"] == [1.0, 2.0]
    assert (one["mine"], other["mine"]) == ([0, 2, 4, 6], [1, 3, 5])


def test_processes_that_disagree_are_refused(together: Job, alone: Job) -> None:
    for facts in together.facts:
        assert facts["collectives"]["disagreement"].startswith(
            "process 1 has a different number than process 0. Hint: start all"
        )
    assert "disagreement" not in alone.facts[0]["collectives"]


def test_every_shard_is_sampled_by_one_process(together: Job, alone: Job) -> None:
    one, other = (set(facts["stored"]) for facts in together.facts)
    assert not one & other
    assert sorted(one | other) == alone.facts[0]["stored"] == [f"shard-{index:05d}" for index in range(7)]
    assert len(one) - len(other) == 1


def test_every_prompt_is_answered_once_and_all_processes_see_all_responses(together: Job, alone: Job) -> None:
    prompts = alone.facts[0]["prompts"]
    assert len(set(prompts)) == 33
    assert all(facts["prompts"] == prompts for facts in together.facts)


@pytest.mark.parametrize(
    "place",
    [
        "plain",
        "independent/iteration-0/rollouts",
        "independent/iteration-1/rollouts",
        "conditioned/iteration-1/rollouts",
        "independent/calibration",
        "independent/calibration/untilted",
        "measured/reference",
        "measured/sweep",
    ],
)
def test_the_rollouts_of_two_processes_are_those_of_one(together: Job, alone: Job, place: str) -> None:
    found, expected = rows(together.folder / place), rows(alone.folder / place)
    # The critics behind later rollouts differ by rounding, and so does the KL that is measured under them.
    kl, kl_expected = found.pop("kl"), expected.pop("kl")
    assert found == expected
    assert [len(row) for row in kl] == [len(row) for row in kl_expected]
    for row, row_expected in zip(kl, kl_expected, strict=True):
        assert row == pytest.approx(row_expected, abs=1e-4)


def test_two_processes_write_the_files_that_one_writes(together: Job, alone: Job) -> None:
    one, two = (
        {path.relative_to(run.folder) for path in run.folder.rglob("*")}
        - {Path(f"{index}.{ending}") for index in (0, 1) for ending in ("json", "safetensors")}
        for run in (alone, together)
    )
    assert one == two


def test_the_gradient_of_every_batch_is_that_of_one_process(together: Job, alone: Job) -> None:
    expected = {name: value for name, value in alone.tensors[0].items() if name.startswith("gradients/")}
    steps = {name.split("/")[1] for name in expected if name.split("/")[1].isdigit()}
    assert steps == {str(step) for step in range(8)}  # 11 rollouts in batches of three, twice
    for tensors in together.tensors:
        for name, value in expected.items():
            assert value.dtype == torch.float64 or "losses" in name, name
            torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-9 if "losses" not in name else 1e-6)
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if name.startswith("gradients/7/"))


def test_the_gradient_is_the_same_with_every_weight_in_shards(together: Job, alone: Job) -> None:
    for tensors in together.tensors:
        expected = {name: value for name, value in alone.tensors[0].items() if name.startswith("gradients/")}
        for name, value in expected.items():
            found = tensors[name.replace("gradients/", "sharded/")]
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9 if "losses" not in name else 1e-6)


def test_critics_are_bit_identical_in_all_processes(together: Job) -> None:
    one, other = together.tensors
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_the_critic_is_that_of_one_process(together: Job, alone: Job) -> None:
    for name, value in alone.tensors[0].items():
        if not name.startswith("gradients/"):
            torch.testing.assert_close(together.tensors[0][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("composition", ["independent", "conditioned"])
def test_reports_are_those_of_one_process_and_the_same_in_all(together: Job, alone: Job, composition: str) -> None:
    one, other = (facts[composition] for facts in together.facts)
    assert one == other
    for report, expected in zip(one, alone.facts[0][composition], strict=True):
        assert set(report) == set(expected)
        for name, metrics in expected.items():
            assert_close(report[name], metrics, name)


def test_a_value_model_learns_what_it_learns_in_one_process(together: Job, alone: Job) -> None:
    one, other = (facts["value model"] for facts in together.facts)
    assert one == other
    assert one == pytest.approx(alone.facts[0]["value model"], rel=1e-4)
    assert abs(one[-1] - one[0]) > 1e-3


def test_only_the_main_process_reports_progress_and_the_evaluation(together: Job, alone: Job) -> None:
    main, other = together.facts
    assert main["independent reports"] > 0
    assert other["independent reports"] == 0
    assert other["measured"] is None
    assert len(main["measured"]) == len(alone.facts[0]["measured"]) == 3
    for row, expected in zip(main["measured"], alone.facts[0]["measured"], strict=True):
        assert row["rewards"] == pytest.approx(expected["rewards"], rel=1e-3)
        assert row["kl"] == pytest.approx(expected["kl"], abs=1e-4)


def test_distillation_matches_one_process(together: Job, alone: Job) -> None:
    one, other = (facts["distilled"] for facts in together.facts)
    assert one == other
    for name, metrics in alone.facts[0]["distilled"].items():
        assert_close(one[name], metrics, name)


def test_the_command_evaluates_with_two_processes_and_reports_once(
    command: Any, tiny_folder: Path, together: Job, tmp_path: Path
) -> None:
    critic = tmp_path / "critic"  # away from its run, which was for other objectives of these names
    shutil.copytree(together.folder / "independent" / "critic", critic)
    given = (
        "policy=pretrained",
        f"policy.path={tiny_folder}",
        f"checkpoint={critic}",
        "objective=[brevity]",
        "+objectives.good._target_=hydra.utils.get_method",
        "+objectives.good.path=job.good",
        "evaluation.divisions=1",
        "evaluation.betas=[1.0]",
        "evaluation.samples=2",
        "evaluation.reference_samples=4",
        "evaluation.shard_size=8",
        "evaluation.speed_repeats=1",
        "evaluation.speed_batch=2",
        "decoding.max_new_tokens=8",
        "output=run",
    )
    process: subprocess.Popen[str] = command("torchrun", tmp_path, "evaluate", *given)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("report.json") == out.count("tilted decoding: ") == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["speed"]["tilted"]["ratio"] > 0
    assert len(list((tmp_path / "run" / "rollouts" / "reference").glob("shard-*"))) == 3


def test_saved_critics_equal_those_in_memory(together: Job) -> None:
    for name in ("independent", "conditioned"):
        state = Critic.from_pretrained(together.folder / name / "critic").state_dict()
        for key, value in state.items():
            assert torch.equal(value, together.tensors[0][f"{name}/{key}"]), key
