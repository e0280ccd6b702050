"""Features: replayed rollouts as tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.critics import HiddenStateCritic
from mavis.policies.token_embeddings import token_embeddings
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.rollouts.replay import Sequences, replay
from mavis.training.improvement.features import Features, extract

MakeCritic = Callable[..., HiddenStateCritic]

PROMPTS = ["once upon a time", "the dog", "she said", "he was"] * 3
SETTINGS = RolloutSettings(max_new_tokens=12, top_k=9, temperature=0.9, shard_size=5)


def one_hot_plan(beta: float = 2.0) -> RolloutPlan:
    rows = len(PROMPTS)
    own = torch.eye(2, dtype=torch.float64)[torch.arange(rows) % 2]
    return RolloutPlan(PROMPTS, own, torch.full((rows,), beta, dtype=torch.float64))


@pytest.fixture
def shards_of(
    tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any, tmp_path: Path
) -> Callable[[HiddenStateCritic | None], list[Any]]:
    def run(critic: HiddenStateCritic | None) -> list[Any]:
        plan = one_hot_plan() if critic is not None else RolloutPlan.reference(PROMPTS, 2)
        return list(
            collect(
                tiny_policy,
                tiny_tokenizer,
                tiny_objectives,
                plan,
                tmp_path,
                SETTINGS,
                critic=critic,
                truncate_reference=True,
            )
        )

    return run


@pytest.mark.parametrize("tilted", [False, True])
def test_features_are_the_replayed_steps_of_all_shards_in_their_order(
    tiny_policy: Any, make_tiny_critic: MakeCritic, shards_of: Any, tilted: bool
) -> None:
    critic = make_tiny_critic()
    critic.reward_mean.copy_(torch.tensor([1.0, -5.0]))
    critic.reward_std.copy_(torch.tensor([2.0, 0.5]))
    shards = shards_of(critic if tilted else None)
    embeddings = token_embeddings(tiny_policy)
    features = extract(tiny_policy, shards, embeddings, critic, SETTINGS, tilted=tilted).local_rollouts
    rows = {name: [value for shard in shards for value in shard[name]] for name in shards[0].column_names}

    assert len(features) == len(PROMPTS)
    assert [int(n) for n in features.is_response.sum(1)] == [len(ids) for ids in rows["response_ids"]]
    longest = max(map(len, rows["response_ids"]))
    assert features.kl.shape == (len(PROMPTS), longest)
    for row, (ids, kl) in enumerate(zip(rows["response_ids"], rows["kl"], strict=True)):
        assert features.action_ids[row, : len(ids)].tolist() == ids
        assert features.kl[row].tolist() == pytest.approx(kl + [0.0] * (longest - len(ids)), abs=1e-5)
        lam = torch.tensor([rows["weights"][row]]) * rows["beta"][row]
        steps = replay(
            tiny_policy,
            Sequences.pack([rows["prompt_ids"][row]], [ids]),
            embeddings,
            critic=critic if tilted else None,
            lam=lam,
            top_k=SETTINGS.top_k,
            temperature=SETTINGS.temperature,
        )
        torch.testing.assert_close(features.states[row, : len(ids)], steps.states[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.expected[row, : len(ids)], steps.expected[0], atol=1e-5, rtol=1e-5)
        # What the replay measures is what was recorded while sampling.
        assert kl == pytest.approx(steps.kl[0].tolist(), abs=1e-5)
    expected = (torch.tensor(rows["rewards"]) - torch.tensor([1.0, -5.0])) / torch.tensor([2.0, 0.5])
    torch.testing.assert_close(features.rewards, expected)


def test_reference_rollouts_are_replayed_under_the_evaluated_policy(
    tiny_policy: Any, make_tiny_critic: MakeCritic, shards_of: Any
) -> None:
    critic, embeddings = make_tiny_critic(), token_embeddings(tiny_policy)
    (shard, *_) = shards_of(None)
    lam = torch.tensor([[0.5 + row, 2.0 - row] for row in range(len(shard))])
    relabelled = shard.remove_columns(["weights", "beta"]).add_column("weights", (lam / 4).tolist())
    relabelled = relabelled.add_column("beta", [4.0] * len(shard))
    features = extract(tiny_policy, [relabelled], embeddings, critic, SETTINGS, tilted=True).local_rollouts
    steps = replay(
        tiny_policy,
        Sequences.pack(shard["prompt_ids"][:], shard["response_ids"][:]),
        embeddings,
        critic=critic,
        lam=lam,
        top_k=SETTINGS.top_k,
        temperature=SETTINGS.temperature,
    )
    torch.testing.assert_close(features.lam, lam)
    torch.testing.assert_close(features.kl, steps.kl)
    torch.testing.assert_close(features.expected, steps.expected)
    assert not torch.allclose(features.kl.sum(1), torch.tensor([sum(row) for row in shard["kl"]]))


def test_tilted_rollouts_count_for_the_objective_they_were_tilted_to_and_plain_ones_for_all(
    tiny_policy: Any, make_tiny_critic: MakeCritic, shards_of: Any
) -> None:
    critic = make_tiny_critic()
    shards = shards_of(critic)
    embeddings = token_embeddings(tiny_policy)
    tilted = extract(tiny_policy, shards, embeddings, critic, SETTINGS, tilted=True).local_rollouts
    assert tilted.is_evaluated.tolist() == [[True, False], [False, True]] * 6
    plain = extract(tiny_policy, shards, embeddings, critic, SETTINGS, tilted=False).local_rollouts
    assert plain.is_evaluated.all()


def test_rewards_far_from_zero_keep_their_digits(
    tiny_policy: Any, make_tiny_critic: MakeCritic, shards_of: Any
) -> None:
    critic, shift = make_tiny_critic(), 1e7
    shards = shards_of(None)
    moved = [shard.map(lambda row: {"rewards": [reward + shift for reward in row["rewards"]]}) for shard in shards]
    embeddings = token_embeddings(tiny_policy)
    plain = extract(tiny_policy, shards, embeddings, critic, SETTINGS, tilted=False).local_rollouts
    critic.reward_mean.fill_(shift)
    shifted = extract(tiny_policy, moved, embeddings, critic, SETTINGS, tilted=False).local_rollouts
    torch.testing.assert_close(shifted.rewards, plain.rewards, atol=1e-6, rtol=0)


def test_rows_takes_some_rollouts(tiny_policy: Any, make_tiny_critic: MakeCritic, shards_of: Any) -> None:
    critic = make_tiny_critic()
    features = extract(
        tiny_policy, shards_of(None), token_embeddings(tiny_policy), critic, SETTINGS, tilted=False
    ).local_rollouts
    index = torch.tensor([7, 2])
    some = features.rows(index)
    assert isinstance(some, Features)
    assert len(some) == 2
    for name, tensor in vars(some).items():
        assert torch.equal(tensor, getattr(features, name)[index]), name
