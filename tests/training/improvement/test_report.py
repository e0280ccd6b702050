"""What makes an iteration look useless is said, with what to change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.critics import HiddenStateCritic
from mavis.rollouts import RolloutSettings
from mavis.training import FitSettings, ImprovementSettings, IterationReport, improve
from mavis.training.improvement.report import find_problems, find_rare_rewards, share_cut_off


def report(iteration: int = 0, **other: Any) -> IterationReport:
    fields: dict[str, Any] = {
        "iteration": iteration,
        "rollouts": 64,
        "rewards": {"good": 0.5},
        "kl": {"good": 1.0},
        "goal": {"good": 0.5},
        "goal_error": {"good": 0.1},
        "explained": {"good": 0.4},
        "losses": [1.0, 0.6],
        "critic": "run/critic",
    }
    return IterationReport(**fields | other)


def test_a_good_iteration_has_no_problem() -> None:
    assert find_problems(report(), None) == []
    assert find_problems(report(1, goal={"good": 0.7}), report()) == []
    # A fall within two standard errors, here 2 √(0.1² + 0.1²) = 0.28, is noise.
    assert find_problems(report(1, goal={"good": 0.23}), report()) == []


@pytest.mark.parametrize(
    ("now", "before", "message"),
    [
        (report(explained={"good": -0.25}), None, "the values of good explain nothing .*improvement.rollouts"),
        (report(explained={"good": 0.0}), None, "the values of good explain nothing"),
        (report(cut_off=0.9), None, "90% of the responses were cut off .* Raise decoding.max_new_tokens"),
        (report(1, goal={"good": 0.2}), report(), r"J of good fell from 0.5 to 0.2 \(standard error 0.14\)"),
    ],
)
def test_a_useless_iteration_is_told(now: IterationReport, before: IterationReport | None, message: str) -> None:
    [problem] = find_problems(now, before)
    assert re.search(message, problem)
    assert problem.startswith(f"iteration {now.iteration}: ")


def test_objectives_that_do_not_vary_are_not_blamed() -> None:
    assert find_problems(report(explained={"good": None}), None) == []


def test_a_response_is_cut_off_unless_it_ends_with_an_end_token() -> None:
    shards = [{"response_ids": [[5, 2], [5, 6]]}, {"response_ids": [[2], [7, 3]]}]
    assert share_cut_off(shards, {2, 3}) == 0.25
    assert share_cut_off(shards, set()) == 1.0


def test_training_says_so_at_the_line_of_the_caller(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    settings = ImprovementSettings(
        iterations=1,
        rollouts=16,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=3, top_k=20),
        fit=FitSettings(epochs=1),
    )
    critic = HiddenStateCritic.for_policy(tiny_policy, list(tiny_objectives), hidden=8, rank=4)
    with pytest.warns(UserWarning, match="of the responses were cut off at max_new_tokens") as caught:
        list(improve(tiny_policy, tiny_tokenizer, critic, tiny_objectives, ["the dog"], tmp_path / "run", settings))
    assert {Path(one.filename) for one in caught if "cut off" in str(one.message)} == {Path(__file__)}


def test_an_objective_that_hardly_varies_is_named_with_its_share() -> None:
    raw = torch.zeros(200, 3, dtype=torch.float64)
    raw[:3, 0] = 1.0  # 98.5 % alike
    raw[:20, 1] = 1.0  # 90 %
    raw[:, 2] = torch.linspace(-1, 1, 200, dtype=torch.float64)
    [problem] = find_rare_rewards(["rare", "common", "graded"], raw)
    assert problem.startswith("iteration 0: rare gives 98.5% of the responses the same reward")
    assert "improvement.rollouts" in problem


def test_training_for_an_objective_that_hardly_varies_says_so(tmp_path: Path) -> None:
    policy, tokenizer = mavis.embedded.load()
    critic = HiddenStateCritic.for_policy(policy, ["rare"], hidden=8)
    settings = ImprovementSettings(
        iterations=1,
        rollouts=64,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=4, shard_size=64),
        fit=FitSettings(epochs=1),
    )

    def rare(prompts: Any, responses: Any) -> list[float]:
        return [float(prompt == "a") for prompt in prompts]

    prompts = ["a", *(f"the dog {i}" for i in range(63))]
    with pytest.warns(UserWarning, match="rare gives 98.4% of the responses the same reward"):
        list(improve(policy, tokenizer, critic, {"rare": rare}, prompts, tmp_path, settings))
