"""Calibration: KL by β, and β for a KL budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.critics import Calibration, HiddenStateCritic
from mavis.errors import CriticError
from mavis.rollouts import RolloutSettings
from mavis.training.improvement.calibrate import BETAS, calibrate, calibrated_lengths

PROMPTS = ["once upon a time", "the dog", "she said", "he was", "the little old man ran"]
SETTINGS = RolloutSettings(max_new_tokens=10, top_k=None, shard_size=256)
SAMPLES = 48


@pytest.fixture
def measure(tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path) -> Callable[..., Calibration]:
    def run(critic: HiddenStateCritic, settings: RolloutSettings = SETTINGS, **options: Any) -> Calibration:
        objectives = {name: tiny_objectives[name] for name in critic.objectives}
        arguments: dict[str, Any] = {"samples": SAMPLES} | options
        folder = arguments.pop("folder", tmp_path)
        return calibrate(tiny_policy, tiny_tokenizer, critic, objectives, PROMPTS, folder, settings, **arguments)

    return run


def test_kl_rises_with_beta_in_every_direction(measure: Any, make_tiny_critic: Any) -> None:
    calibration = measure(make_tiny_critic(scale=0.3))
    assert calibration.betas == list(BETAS)
    assert len(calibration.kl) == 3  # either objective alone, and both in equal parts
    for row in calibration.kl:
        assert len(row) == len(BETAS)
        # From strength to strength KL about quadruples, which no noise of 48 rollouts hides.
        assert all(low < high for low, high in pairwise(row))
        assert row[0] > 0
    assert (calibration.max_new_tokens, calibration.top_k) == (10, None)


def test_small_strengths_cost_kl_quadratically(measure: Any, make_tiny_critic: Any) -> None:
    calibration = measure(make_tiny_critic(scale=0.3), betas=[0.05, 0.1], samples=400)
    for low, high in calibration.kl:
        assert high / low == pytest.approx(4.0, rel=0.15)


def test_beta_gives_back_the_strengths_that_were_measured(measure: Any, make_tiny_critic: Any) -> None:
    calibration = measure(make_tiny_critic(scale=0.3))
    highest = calibration.max_kl()
    checked = 0
    directions = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    for weights, row in zip(directions, calibration.kl, strict=True):
        for beta, kl in zip(calibration.betas, row, strict=True):
            if kl <= highest:
                assert calibration.beta(torch.tensor(weights), kl) == pytest.approx(beta, rel=1e-6)
                checked += 1
    assert checked >= 10


def test_a_kl_budget_is_met(
    measure: Any, make_tiny_critic: Any, tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> None:
    from mavis.rollouts import RolloutPlan, collect

    critic = make_tiny_critic(scale=0.3)
    calibration = measure(critic, samples=200)
    target, weights = 1.0, torch.tensor([0.2, 0.8], dtype=torch.float64)
    rows = 200
    plan = RolloutPlan(
        [PROMPTS[i % len(PROMPTS)] for i in range(rows)],
        weights.expand(rows, 2),
        torch.full((rows,), calibration.beta(weights, target), dtype=torch.float64),
    )
    shards = collect(tiny_policy, tiny_tokenizer, tiny_objectives, plan, tmp_path / "check", SETTINGS, critic=critic)
    spent = torch.tensor([sum(kl) for shard in shards for kl in shard["kl"]])
    # (0.2, 0.8) was not measured, so the ellipsoid through the neighbours is tried as well as the sampling.
    assert float(spent.mean()) == pytest.approx(target, rel=0.25)


def test_a_critic_that_predicts_nothing_moves_nothing(measure: Any, tiny_policy: Any) -> None:
    critic = HiddenStateCritic.for_policy(tiny_policy, ["good", "brevity"], hidden=8, rank=4)
    calibration = measure(critic, samples=2)
    assert all(kl == pytest.approx(0.0, abs=1e-5) for row in calibration.kl for kl in row)


def test_a_single_objective_has_a_single_direction(measure: Any, make_tiny_critic: Any) -> None:
    calibration = measure(make_tiny_critic("good"), samples=2)
    assert len(calibration.kl) == 1


def test_a_second_call_reads_its_rollouts_from_disk(measure: Any, make_tiny_critic: Any, tiny_policy: Any) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the policy was called")

    critic = make_tiny_critic()
    first = measure(critic, samples=3)
    hook = tiny_policy.register_forward_pre_hook(never)
    try:
        assert measure(critic, samples=3) == first
    finally:
        hook.remove()


def test_the_critic_is_not_changed(measure: Any, make_tiny_critic: Any) -> None:
    critic = make_tiny_critic()
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    measure(critic, samples=2)
    assert critic.calibration is None
    assert critic.attached_policy is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())


def test_a_budget_beyond_what_was_measured_is_refused(measure: Any, make_tiny_critic: Any) -> None:
    calibration = measure(make_tiny_critic(scale=0.3), samples=4)
    with pytest.raises(CriticError, match="the critic was calibrated up to"):
        calibration.beta(torch.tensor([0.5, 0.5]), max(calibration.kl[2]) * 1.5)


def test_kl_is_measured_at_half_twice_and_four_times_the_length(measure: Any, make_tiny_critic: Any) -> None:
    calibration = measure(make_tiny_critic(scale=0.3))
    assert calibration.lengths == [5, 10, 20, 40]
    assert calibration.kl_at_lengths[1] == calibration.kl
    for shorter, longer in pairwise(calibration.kl_at_lengths):
        for low, high in zip(shorter, longer, strict=True):
            assert all(one <= other for one, other in zip(low, high, strict=True))  # a sum over the same responses


def test_lengths_stop_at_the_policys_context(tiny_policy: Any, tiny_tokenizer: Any) -> None:
    prompts = ["once upon a time"]
    used = len(tiny_tokenizer(prompts)["input_ids"][0])
    context = tiny_policy.config.max_position_embeddings
    fits = (context - used) // 4
    assert calibrated_lengths(tiny_policy, tiny_tokenizer, prompts, fits) == [fits // 2, fits, 2 * fits, 4 * fits]
    assert calibrated_lengths(tiny_policy, tiny_tokenizer, prompts, fits + 1)[-1] == 2 * (fits + 1)
    assert calibrated_lengths(tiny_policy, tiny_tokenizer, prompts, context)[-1] == context  # the trained one stays
