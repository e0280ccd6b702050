"""Reward differences of pairs, and the file format of answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mavis.critics import HiddenStateCritic
from mavis.errors import DataError, ObjectiveError, PreferenceError
from mavis.preference import Pair, read_pairs, reward_differences
from mavis.preference.pairs import read_answers, write_answers

PAIRS = [Pair("the dog", " is good good", " is bad"), Pair("she", " ran to the park", " ran good")]


@pytest.fixture
def critic(make_tiny_critic: Callable[..., HiddenStateCritic]) -> HiddenStateCritic:
    """A critic with a mean and a std per objective."""
    critic = make_tiny_critic("good", "brevity")
    critic.reward_mean.copy_(torch.tensor([1.0, -9.0]))
    critic.reward_std.copy_(torch.tensor([0.5, 4.0]))
    return critic


def test_differences_are_in_standard_deviations(critic: Any, tiny_objectives: dict[str, Any]) -> None:
    # good 2 − 0 and 0 − 1, brevity −3 + 2 and −4 + 2
    expected = [[2 / 0.5, -1 / 4], [-1 / 0.5, -2 / 4]]
    assert reward_differences(PAIRS, tiny_objectives, critic).tolist() == expected


def test_columns_follow_the_critic_and_others_are_not_scored(critic: Any, tiny_objectives: dict[str, Any]) -> None:
    def never(prompts: Any, responses: Any) -> list[float]:
        raise AssertionError

    objectives = {"never": never, **dict(reversed(tiny_objectives.items()))}
    given = reward_differences(PAIRS, objectives, critic)
    assert torch.equal(given, reward_differences(PAIRS, tiny_objectives, critic))


def test_a_swapped_pair_is_the_negated_difference(critic: Any, tiny_objectives: dict[str, Any]) -> None:
    swapped = [pair.swapped() for pair in PAIRS]
    given = reward_differences(swapped, tiny_objectives, critic)
    assert torch.equal(given, -reward_differences(PAIRS, tiny_objectives, critic))
    assert [pair.swapped() for pair in swapped] == PAIRS


def test_pairs_that_cannot_be_scored_are_refused(critic: Any, tiny_objectives: dict[str, Any]) -> None:
    with pytest.raises(PreferenceError, match="pairs is empty"):
        reward_differences([], tiny_objectives, critic)
    misspelt = {"god": tiny_objectives["good"], "brevity": tiny_objectives["brevity"]}
    with pytest.raises(ObjectiveError, match="objectives lacks the critic's 'good' and has: god, brevity.*did you"):
        reward_differences(PAIRS, misspelt, critic)
    broken = tiny_objectives | {"good": lambda prompts, responses: [float("nan")] * len(responses)}
    with pytest.raises(ObjectiveError, match="a reward is a finite number"):
        reward_differences(PAIRS, broken, critic)


TEXT = st.text(st.characters(codec="utf-8"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
@given(st.lists(st.tuples(st.builds(Pair, TEXT, TEXT, TEXT), st.booleans())))
def test_answers_round_trip(tmp_path: Path, answers: list[tuple[Pair, bool]]) -> None:
    write_answers(tmp_path / "answers.jsonl", answers)
    assert read_answers(tmp_path / "answers.jsonl") == answers
    assert read_pairs(tmp_path / "answers.jsonl") == [pair for pair, is_skipped in answers if not is_skipped]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 of '.*' is not JSON"),
        ('["a", "b"]', "line 2 of .* expected an object with the texts prompt, chosen and rejected"),
        ('{"prompt": "a", "chosen": "b"}', "line 2 of .* expected an object"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', "line 2 of .* expected an object"),
        ('{"prompt": "a", "skipped": ["b"]}', "line 2 of .* expected an object"),
        ('{"prompt": "a", "skipped": "bc"}', "line 2 of .* expected an object"),
    ],
)
def test_a_line_that_is_not_a_pair_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=f"{message}.* Hint: "):
        read_pairs(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'.*nothing', which cannot be read: No such file"):
        read_pairs(tmp_path / "nothing")
    with pytest.raises(DataError, match="which cannot be read: Is a directory"):
        read_pairs(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="which is not UTF-8 text"):
        read_pairs(tmp_path / "latin")
