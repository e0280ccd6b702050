"""Lexical objectives against values worked out by hand, and on any text at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis.errors import ObjectiveError
from mavis.rewards import Brevity, Dialogue, Objective, Positive, Readability, exclamations, score

ALL: dict[str, Objective] = {
    "positive": Positive(),
    "dialogue": Dialogue(),
    "brevity": Brevity(),
    "readability": Readability(),
    "exclamations": exclamations,
}
ODD_TEXTS = st.text() | st.text(alphabet="\"“”. !?'a\n\u00e9😀", max_size=60)


def one(objective: Objective, response: str) -> float:
    (reward,) = objective(["a prompt"], [response])
    return float(reward)


@pytest.mark.parametrize(
    ("response", "inside", "length"),
    [
        ("", 0, 1),
        ("no talk at all", 0, 14),
        ('He said "hi" now', 2, 16),
        ("He said “hi” now", 2, 16),
        ('a "b" and "c" but more of it', 2, 28),
        ('It went on: "so', 2, 15),  # never closed: to the end
        ("It went on: “so", 2, 15),
        ('""', 0, 2),
        ('"', 0, 1),
        ("it's 'fine' said", 0, 16),  # single marks are apostrophes
        ("stray ” mark here", 0, 17),  # a closing mark opens nothing
        ("he “said “x” then stopped there at once", 7, 39),  # the first closing mark ends it
        ('“a"b” after this there is quite a bit', 3, 37),  # closes by the mark that matches only
    ],
)
def test_dialogue_by_hand(response: str, inside: int, length: int) -> None:
    assert max(1, len(response)) == length
    assert one(Dialogue(), response) == pytest.approx(3 * inside / length)


def test_dialogue_is_full_from_a_third_on() -> None:
    assert one(Dialogue(), '"Hello there," she said.') == 1.0
    assert one(Dialogue(), '"abcd" said') == 1.0  # 4 of 11
    assert one(Dialogue(), '"abc" said') == pytest.approx(0.9)  # 3 of 10


@pytest.mark.parametrize(
    ("response", "valence"),
    [
        ("", 0.0),
        ("the table", 0.0),
        ("good", 1.9),
        ("not good", 1.9 * -0.74),
        ("good!", 1.9 + 0.292),
        ("very good", 1.9 + 0.293),
        ("bad", -2.5),
    ],
)
def test_positive_by_hand(response: str, valence: float) -> None:
    assert one(Positive(), response) == pytest.approx(valence / math.sqrt(valence**2 + 15), abs=5e-5)


@pytest.mark.parametrize(
    ("response", "reward"),
    [("", 0.0), ("one", -0.1), ("two words", -0.2), ("  a\nb\t c  ", -0.3), ("well-known, isn't it", -0.3)],
)
def test_brevity_by_hand(response: str, reward: float) -> None:
    assert one(Brevity(scale=10), response) == pytest.approx(reward)
    assert math.copysign(1, one(Brevity(), "")) == 1.0


@pytest.mark.parametrize(
    ("response", "characters", "words", "sentences"),
    [
        ("The cat sat on the mat.", 18, 6, 1),
        ("The cat sat. The dog ran away.", 24, 7, 2),
        ("The cat sat. No way. The dog ran.", 26, 8, 2),  # two words are no sentence
        ("Hello", 5, 1, 1),
        ("Considerable international deliberation followed.", 46, 4, 1),
    ],
)
def test_readability_by_hand(response: str, characters: int, words: int, sentences: int) -> None:
    index = 4.71 * characters / words + 0.5 * words / sentences - 21.43
    assert one(Readability(hardest=100), response) == pytest.approx(-index)


def test_readability_is_bounded() -> None:
    assert one(Readability(), "a" * 10_000) == -20.0
    assert one(Readability(hardest=12), "a" * 10_000) == -12.0
    assert one(Readability(), "The cat sat.") > one(Readability(), "Considerable deliberation followed.")


@pytest.mark.parametrize("response", ["", "   ", "...", "?!", "__", "😀", "\x00"])
def test_saying_nothing_is_not_easy_to_read(response: str) -> None:
    assert one(Readability(hardest=15), response) == -15.0


def test_exclamations_by_hand() -> None:
    assert exclamations(["p"] * 3, ["", "Oh!", "!a!!"]) == [0, 1, 3]


@given(ODD_TEXTS)
def test_every_text_gets_finite_rewards_in_range(response: str) -> None:
    positive, dialogue, brevity, readability, shouts = score(ALL, [""], [response])[0]
    assert -1 <= positive <= 1
    assert 0 <= dialogue <= 1
    assert brevity <= 0
    assert -20 <= readability <= 17
    assert shouts == response.count("!")


@given(st.lists(ODD_TEXTS, min_size=1, max_size=4), st.lists(ODD_TEXTS, min_size=1, max_size=4))
def test_a_reward_depends_on_its_own_response_only(texts: list[str], others: list[str]) -> None:
    together = score(ALL, ["p"] * len(texts + others), texts + others)
    assert (together[: len(texts)] == score(ALL, ["another"] * len(texts), texts)).all()


@given(ODD_TEXTS, st.text(alphabet="abc", min_size=1, max_size=5))
def test_brevity_falls_with_every_word(response: str, word: str) -> None:
    assert one(Brevity(), f"{response} {word}") < one(Brevity(), response)


@given(ODD_TEXTS)
def test_dialogue_rises_when_the_response_is_quoted(response: str) -> None:
    unquoted = response.translate({ord(mark): "'" for mark in '"“”'})
    assert one(Dialogue(), unquoted) == 0
    assert one(Dialogue(), f'"{unquoted}"') == min(1, 3 * len(unquoted) / (len(unquoted) + 2))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_options_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"scale is .*, expected a finite number > 0\. Hint"):
        Brevity(scale=value)
    with pytest.raises(ObjectiveError, match=r"hardest is .*, expected a finite number > 0\. Hint"):
        Readability(hardest=value)


def test_the_vader_lexicon_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaderSentiment import vaderSentiment

    one(Positive(), "warm up")
    monkeypatch.setattr(vaderSentiment, "SentimentIntensityAnalyzer", None)
    assert one(Positive(), "good") > 0
