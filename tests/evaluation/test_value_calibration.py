"""Predicted values against returns that are constructed from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis.critics import CriticGroup, HiddenStateCritic
from mavis.evaluation.value_calibration import value_calibration
from mavis.rollouts import RolloutSettings

SAMPLING = RolloutSettings(max_new_tokens=12, top_k=20)
BETA = 2.5


@pytest.fixture
def critic(tiny_policy: Any) -> HiddenStateCritic:
    """Two objectives whose values depend on the token alone: a tenth of its id, and the negative."""
    critic = HiddenStateCritic.for_policy(tiny_policy, ["up", "down"], hidden=4, rank=1, composition="independent")
    with torch.no_grad():
        critic.heads.bias[:, :-1] = torch.tensor([[1.0], [-1.0]])
        critic.token_table[:, 0] = torch.arange(61) / 10
    critic.reward_mean.copy_(torch.tensor([5.0, -3.0]))
    critic.reward_std.copy_(torch.tensor([2.0, 0.5]))
    return critic


def columns(weights: list[float], beta: float, rows: int = 40) -> dict[str, list[Any]]:
    """Create responses whose return equals the value at the step that is compared, and only there.

    That step is a quarter, a half and three quarters of the way from the first token to the last, in turn.
    """
    generator = torch.Generator().manual_seed(int(beta * 10) + int(weights[0]))
    result: dict[str, list[Any]] = {
        name: [] for name in ("prompt_ids", "response_ids", "kl", "rewards", "weights", "beta")
    }
    for row in range(rows):
        length = int(torch.randint(1, 13, (), generator=generator))
        ids = torch.randint(4, 61, (length,), generator=generator)
        kl = torch.rand(length, generator=generator) if beta else torch.zeros(length)
        compared = (length - 1) * (row % 3 + 1) // 4
        later_kl = float(kl[compared + 1 :].sum()) / beta if beta else 0.0
        up, down = float(ids[compared]) / 10 + later_kl, -float(ids[compared]) / 10 + later_kl
        result["prompt_ids"].append([5] * (1 + row % 4))
        result["response_ids"].append(ids.tolist())
        result["kl"].append(kl.tolist())
        result["rewards"].append([2.0 * up + 5.0, 0.5 * down - 3.0])
        result["weights"].append(weights)
        result["beta"].append(beta)
    return result


def joined(*parts: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def test_one_step_per_response_is_compared_with_the_return_from_there(
    tiny_policy: Any, critic: HiddenStateCritic
) -> None:
    reference = columns([0.0, 0.0], 0.0)
    sweep = joined(columns([1.0, 0.0], BETA), columns([0.0, 1.0], BETA, rows=30))
    found = value_calibration(tiny_policy, critic, reference, sweep, SAMPLING)
    assert [(entry.objective, entry.beta) for entry in found] == [
        ("up", 0.0),
        ("up", BETA),
        ("down", 0.0),
        ("down", BETA),
    ]
    for entry, responses in zip(found, (40, 40, 40, 30), strict=True):
        assert entry.slope == pytest.approx(1.0, abs=1e-4)
        assert entry.intercept == pytest.approx(0.0, abs=1e-4)
        assert entry.r_squared == pytest.approx(1.0, abs=1e-4)
        assert sum(row.count for row in entry.rows) == responses
        for row in entry.rows:
            assert row.predicted == pytest.approx(row.observed, abs=1e-4)


def test_a_group_has_the_calibration_of_its_members(tiny_policy: Any, critic: HiddenStateCritic) -> None:
    members = []
    for m, name in enumerate(critic.objectives):
        member = HiddenStateCritic.for_policy(tiny_policy, [name], hidden=4, rank=1, composition="independent")
        with torch.no_grad():
            member.heads.bias[:, :-1] = critic.heads.bias[m, :-1]
            member.token_table.copy_(critic.token_table)
        member.reward_mean.copy_(critic.reward_mean[m : m + 1])
        member.reward_std.copy_(critic.reward_std[m : m + 1])
        members.append(member)
    reference = columns([0.0, 0.0], 0.0)
    sweep = joined(columns([1.0, 0.0], BETA), columns([0.0, 1.0], BETA))
    found = value_calibration(tiny_policy, CriticGroup(members), reference, sweep, SAMPLING)
    assert found == value_calibration(tiny_policy, critic, reference, sweep, SAMPLING)


def test_only_responses_tilted_to_the_objective_alone_are_compared(tiny_policy: Any, critic: HiddenStateCritic) -> None:
    mixed, double = columns([0.5, 0.5], BETA), columns([2.0, 0.0], BETA)
    for other in (mixed, double):
        other["rewards"] = [[1e3, 1e3]] * len(other["rewards"])
    sweep = joined(mixed, columns([1.0, 0.0], BETA), double, columns([1.0, 0.0], 1.0))
    found = value_calibration(tiny_policy, critic, columns([0.0, 0.0], 0.0), sweep, SAMPLING)
    assert [(entry.objective, entry.beta) for entry in found] == [
        ("up", 0.0),
        ("up", 1.0),
        ("up", BETA),
        ("down", 0.0),
    ]
    assert all(entry.r_squared == pytest.approx(1.0, abs=1e-4) for entry in found)


def test_a_limited_number_of_responses_are_compared_evenly_spaced(
    tiny_policy: Any, critic: HiddenStateCritic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mavis.evaluation.value_calibration._MAX_RESPONSES", 16)
    reference = columns([0.0, 0.0], 0.0, rows=47)
    found = value_calibration(tiny_policy, critic, reference, columns([1.0, 0.0], BETA, rows=16), SAMPLING)
    counts = [sum(row.count for row in entry.rows) for entry in found]
    assert counts == [16, 16, 16]  # every third of 47, and all of 16
