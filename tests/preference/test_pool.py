"""Candidate pairs: sampled under different weights, scored once, and in a random order within each pair."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.critics import CriticGroup, HiddenStateCritic
from mavis.errors import DataError, DecodingError, PreferenceError
from mavis.preference import candidate_pairs, reward_differences
from mavis.rollouts import RolloutSettings, collect

PROMPTS = ["once upon a time", "the dog", "she said"]
SETTINGS = RolloutSettings(max_new_tokens=12, top_k=20, shard_size=5)


@pytest.fixture
def parts(
    tiny_policy: Any,
    tiny_tokenizer: Any,
    make_tiny_critic: Callable[..., HiddenStateCritic],
    tiny_objectives: dict[str, Any],
) -> tuple[Any, ...]:
    """Policy, tokenizer, critic and objectives; the critic has a std per objective."""
    critic = make_tiny_critic("good", "brevity")
    critic.reward_std.copy_(torch.tensor([0.5, 4.0]))
    return tiny_policy, tiny_tokenizer, critic, tiny_objectives


def test_pairs_share_their_prompt_and_differ_in_their_rewards(parts: tuple[Any, ...], tmp_path: Path) -> None:
    pool = candidate_pairs(*parts, [*PROMPTS, "the dog"], tmp_path, SETTINGS, beta=4.0)
    _, _, critic, objectives = parts
    assert {pair.prompt for pair in pool.pairs} == set(PROMPTS)
    # an untilted response and one for each of the weights (1, 0), (½, ½) and (0, 1): six pairs of each prompt at most
    assert 3 < len(pool.pairs) == len(pool.differences) <= 6 * len(PROMPTS)
    assert len(set(pool.pairs)) == len(pool.pairs)
    assert all(pair.chosen.strip() != pair.rejected.strip() for pair in pool.pairs)
    assert bool(pool.differences.any(dim=1).all())
    torch.testing.assert_close(pool.differences, reward_differences(pool.pairs, objectives, critic))


def test_sampling_is_deterministic_and_stored(
    parts: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = candidate_pairs(*parts, PROMPTS, tmp_path / "a", SETTINGS, beta=4.0)
    again = candidate_pairs(*parts, PROMPTS, tmp_path / "b", SETTINGS, beta=4.0)
    monkeypatch.setattr(sys.modules["mavis.rollouts.collect"], "_sample", None)  # the function hides the module
    kept = candidate_pairs(*parts, PROMPTS, tmp_path / "a", SETTINGS, beta=4.0)
    assert first.pairs == again.pairs == kept.pairs
    assert torch.equal(first.differences, again.differences)
    assert torch.equal(first.differences, kept.differences)
    with pytest.raises(DataError, match="holds rollouts with different plan"):
        candidate_pairs(*parts, PROMPTS, tmp_path / "a", SETTINGS, beta=3.0)


def test_the_order_within_a_pair_does_not_reveal_the_weights(parts: tuple[Any, ...], tmp_path: Path) -> None:
    # At this strong a tilt the response for "good" earns more of it than the untilted one before it in the grid.
    prompts = [f"{one} {two}" for one in ("the", "a", "one", "big") for two in ("dog", "cat", "man", "bird")]
    pool = candidate_pairs(*parts, prompts, tmp_path, SETTINGS, beta=4.0)
    first_is_better = (pool.differences[:, 0] > 0).double().mean()
    assert 0.2 < float(first_is_better) < 0.8


def test_a_finer_grid_gives_more_pairs(parts: tuple[Any, ...], tmp_path: Path) -> None:
    coarse = candidate_pairs(*parts, PROMPTS, tmp_path / "coarse", SETTINGS, beta=4.0, divisions=1)
    fine = candidate_pairs(*parts, PROMPTS, tmp_path / "fine", SETTINGS, beta=4.0, divisions=4)
    assert len(coarse.pairs) < len(fine.pairs)


def test_without_a_calibration_the_strength_must_be_given(parts: tuple[Any, ...], tmp_path: Path) -> None:
    with pytest.raises(DecodingError, match="the critic carries no calibration to derive beta from"):
        candidate_pairs(*parts, PROMPTS, tmp_path, SETTINGS)


def test_responses_with_equal_rewards_are_refused(parts: tuple[Any, ...], tmp_path: Path) -> None:
    policy, tokenizer, critic, _ = parts
    flat = {name: lambda prompts, responses: [1.0] * len(responses) for name in critic.objectives}
    with pytest.raises(PreferenceError, match="no two responses to any of the 3 prompts differ in their rewards"):
        candidate_pairs(policy, tokenizer, critic, flat, PROMPTS, tmp_path, SETTINGS, beta=4.0)


def test_no_question_comes_twice(parts: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_distinct_responses(*arguments: Any, **options: Any) -> Any:
        for shard in collect(*arguments, **options):
            responses = [[" once.", " twice twice.", " once. "][i % 3] for i in range(len(shard["response"]))]
            rewards = [[float(len(response.strip()))] * 2 for response in responses]
            yield {"response": responses, "rewards": rewards}

    monkeypatch.setattr("mavis.preference.pool.collect", two_distinct_responses)
    pool = candidate_pairs(*parts, PROMPTS, tmp_path, SETTINGS, beta=4.0)
    questions = [(pair.prompt, frozenset({pair.chosen.strip(), pair.rejected.strip()})) for pair in pool.pairs]
    assert len(questions) == len(set(questions)) == len(PROMPTS)


def test_several_critics_are_the_group_of_them(parts: tuple[Any, ...], tiny_policy: Any, tmp_path: Path) -> None:
    critics = [
        HiddenStateCritic.for_policy(tiny_policy, [name], hidden=4, rank=2, composition="independent")
        for name in ("good", "brevity")
    ]
    policy, tokenizer, _, objectives = parts
    pools = [
        candidate_pairs(policy, tokenizer, critic, objectives, PROMPTS, tmp_path / name, SETTINGS, beta=4.0)
        for name, critic in {"list": critics, "group": CriticGroup(critics)}.items()
    ]
    assert pools[0].pairs == pools[1].pairs
    torch.testing.assert_close(pools[0].differences, reward_differences(pools[0].pairs, objectives, critics))
