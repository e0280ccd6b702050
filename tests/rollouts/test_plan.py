"""What is planned, how it is cut into shards, and how one plan is told from another."""

from __future__ import annotations

import pytest
import torch

from mavis.rollouts import RolloutPlan


def plan(rows: int = 7) -> RolloutPlan:
    generator = torch.Generator().manual_seed(0)
    return RolloutPlan(
        [f"prompt {row}" for row in range(rows)],
        torch.rand(rows, 2, dtype=torch.float64, generator=generator),
        torch.rand(rows, dtype=torch.float64, generator=generator),
    )


def test_a_reference_plan_weighs_nothing() -> None:
    reference = RolloutPlan.reference(["a", "b"], 3)
    assert reference.weights.shape == (2, 3)
    assert not reference.weights.any()
    assert not reference.betas.any()
    assert reference.weights.dtype == reference.betas.dtype == torch.float64


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_shards_laid_end_to_end_are_the_plan(size: int, lengths: list[int]) -> None:
    whole = plan()
    shards = whole.shards(size)
    assert [len(shard.prompts) for shard in shards] == lengths
    assert [prompt for shard in shards for prompt in shard.prompts] == whole.prompts
    assert torch.equal(torch.cat([shard.weights for shard in shards]), whole.weights)
    assert torch.equal(torch.cat([shard.betas for shard in shards]), whole.betas)


def test_a_plan_of_nothing_has_no_shard() -> None:
    assert RolloutPlan.reference([], 2).shards(4) == []


def test_equal_plans_have_equal_digests() -> None:
    assert plan().digest() == plan().digest()
    assert RolloutPlan(tuple(plan().prompts), plan().weights, plan().betas).digest() == plan().digest()


def test_the_digest_tells_plans_apart_by_everything_in_them() -> None:
    whole = plan()
    digests = {
        whole.digest(),
        RolloutPlan(whole.prompts[::-1], whole.weights, whole.betas).digest(),
        RolloutPlan([*whole.prompts[:-1], "prompt 6 "], whole.weights, whole.betas).digest(),
        RolloutPlan(whole.prompts, whole.weights + 1e-9, whole.betas).digest(),
        RolloutPlan(whole.prompts, whole.weights.flip(1), whole.betas).digest(),
        RolloutPlan(whole.prompts, whole.weights, whole.betas * (1 + 1e-12)).digest(),
        *(shard.digest() for shard in whole.shards(3)),
    }
    assert len(digests) == 9
