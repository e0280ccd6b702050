"""Lexical objectives against values worked out by hand, and on any text at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis.errors import ObjectiveError
from mavis.rewards import Brevity, Dialogue, Objective, Positive, Readability, Signed, exclamations, score

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
    ("response", "words"),
    [
        ("one", 1),
        ("two words", 2),
        ("  a\nb\t c  ", 3),
        ("well-known, isn't it", 3),
        ('"Oh!" she said. "It’s you..."', 5),
        ("Hello — and welcome.", 3),
        ("In 1984", 5),
        ("1234567890" * 6, 60),  # digits without spaces
        ("3.14159", 6),
        ("٣٤٥", 3),
        ("a" * 12, 1),
        ("a" * 13, 2),
        ("a" * 120, 10),
        ("one-two-three-four-five-six", 3),
        ("Hi" + "\n" * 60, 13),
        ("Hi" + "!" * 60, 13),
        ("Hi" + " ." * 30, 13),
        ("Hi" + "_" * 60, 13),
        ("Hi" + "😀" * 60, 13),
        ("Hi" + "\u200b" * 60, 13),
        ("我喜歡狗", 4),
        ("こんにちは", 5),
        ("Привет, мир", 2),
        ("x1y2", 4),
    ],
)
def test_brevity_by_hand(response: str, words: int) -> None:
    assert one(Brevity(scale=10), response) == pytest.approx(-words / 10)


@pytest.mark.parametrize("response", ["", "   ", "\n" * 64, "...", "?!", "__", "😀", "\x00", '""', "\u200b"])
def test_saying_nothing_never_wins_brevity(response: str) -> None:
    assert one(Brevity(scale=10, longest=50), response) == -5.0
    assert one(Brevity(), response) == one(Brevity(), "word " * 200) == one(Brevity(), "word " * 1000) == -2.0
    assert one(Brevity(), response) < one(Brevity(), "word " * 199)


FLOODS = {
    "words": "the ",
    "digits": "7",
    "spaced digits": "7 ",
    "letters": "aaaa",
    "hyphens": "-ab",
    "apostrophes": "'ve",
    "marks": "!?..",
    "blank lines": "\n\n\n\n",
    "spaces": "    ",
    "dashes": "————",
    "characters": "我",
    "accents": "e\u0301e\u0301",
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_response_cut_off_at_the_limit_is_not_brief(name: str) -> None:
    """64 tokens of anything, after a start that says something, are longer than a finished sentence."""
    assert one(Brevity(), "So" + FLOODS[name] * 64) < one(Brevity(), "So they went home, and slept.")


@given(ODD_TEXTS, ODD_TEXTS)
def test_no_text_makes_a_response_briefer(response: str, more: str) -> None:
    said = "So " + response
    assert one(Brevity(), said + " " + more) <= one(Brevity(), said)


def test_cutting_a_response_off_is_worth_the_words_that_are_missing() -> None:
    finished = "The dog ran to the old man. He was happy."
    for objective in (Positive(), Dialogue(), Readability(), exclamations):
        cut = finished.removesuffix(".")
        assert one(objective, cut) == pytest.approx(one(objective, finished), abs=0.6)
    assert one(Brevity(), finished.removesuffix(" happy.")) == pytest.approx(one(Brevity(), finished) + 0.01)


@pytest.mark.parametrize("name", ["dialogue", "brevity", "readability", "exclamations"])
def test_an_empty_response_scores_the_least(name: str) -> None:
    empty = one(ALL[name], "")
    others = ["So they went.", '"Hi," he said!', "7" * 64, "word " * 64, "\n" * 64, "!", "a"]
    assert all(empty <= one(ALL[name], other) for other in others)


def test_an_empty_response_is_neither_positive_nor_negative() -> None:
    assert one(Positive(), "") == one(Signed(Positive()), "") == 0 < one(Positive(), "A good day.")


@pytest.mark.parametrize("response", ['"' + " " * 64, '" " " " " "', '"...', '"""""""', "“  ”", 'He said "" and "!"'])
def test_quoting_nothing_is_no_dialogue(response: str) -> None:
    assert one(Dialogue(), response) == 0


@pytest.mark.parametrize(
    "response", ['He went out. "a' + " " * 64, " " * 64 + 'He went out. "a', 'He went out. "a  "   ']
)
def test_blanks_add_no_dialogue(response: str) -> None:
    assert one(Dialogue(), response) <= one(Dialogue(), 'He went out. "a')


@pytest.mark.parametrize(
    "response", ["7" * 64, "a" * 64, "one-two-three-four-five-six-seven", "7 " * 300, "word " * 300]
)
def test_floods_are_not_easy_to_read(response: str) -> None:
    assert one(Readability(), response) == -20.0


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
    assert -2 <= brevity < 0
    assert -20 <= readability <= 17
    assert shouts == response.count("!")


@given(st.lists(ODD_TEXTS, min_size=1, max_size=4), st.lists(ODD_TEXTS, min_size=1, max_size=4))
def test_a_reward_depends_on_its_own_response_only(texts: list[str], others: list[str]) -> None:
    together = score(ALL, ["p"] * len(texts + others), texts + others)
    assert (together[: len(texts)] == score(ALL, ["another"] * len(texts), texts)).all()


@given(ODD_TEXTS, st.text(alphabet="abc", min_size=1, max_size=5))
def test_brevity_falls_with_every_word(response: str, word: str) -> None:
    said = f"So {response}"
    assert one(Brevity(longest=10_000), f"{said} {word}") < one(Brevity(longest=10_000), said)


@given(ODD_TEXTS)
def test_dialogue_rises_when_the_response_is_quoted(response: str) -> None:
    unquoted = response.translate({ord(mark): "'" for mark in '"“”'})
    assert one(Dialogue(), unquoted) == 0
    words = f"a{unquoted}a"
    assert one(Dialogue(), f'"{words}"') == min(1, 3 * len(words) / (len(words) + 2))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_options_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(ObjectiveError, match=r"scale is .*, expected a finite number > 0\. Hint"):
        Brevity(scale=value)
    with pytest.raises(ObjectiveError, match=r"hardest is .*, expected a finite number > 0\. Hint"):
        Readability(hardest=value)
    with pytest.raises(ObjectiveError, match=r"longest is .*, expected a whole number ≥ 1\. Hint"):
        Brevity(longest=value)


def test_the_vader_lexicon_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaderSentiment import vaderSentiment

    one(Positive(), "warm up")
    monkeypatch.setattr(vaderSentiment, "SentimentIntensityAnalyzer", None)
    assert one(Positive(), "good") > 0
