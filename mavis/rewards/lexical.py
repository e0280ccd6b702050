"""Objectives that read only the response's text: no model, no network, well under a millisecond each."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from mavis.errors import ObjectiveError, check_number, check_whole

# A quotation ends at the mark that matches its opening mark, or where the response ends.
_QUOTATION = re.compile(r'"([^"]*)"?|“([^”]*)”?')

# A word, with apostrophes and hyphens inside; a digit; or what is between them. Chinese and Japanese characters, which
# are written without spaces, come one by one.
_CHARACTER = "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_LETTER = rf"(?!{_CHARACTER})[^\W\d_]"
_PIECE = re.compile(rf"(?P<word>(?:{_LETTER})+(?:['’-](?:{_LETTER})+)*)|(?P<one>\d|{_CHARACTER})|(?P<gap>[\W_]+)")
_LONGEST_WORD = 12  # letters that count as one word
_LONGEST_GAP = 5  # white space and punctuation in a row that counts as a word


class Positive:
    """Reward positive wording: the compound score of VADER.

        R = s / √(s² + 15),   s the sum of the words' valences by VADER's rules

    In [−1, 1]; 0 if no word carries sentiment, as in an empty response. The lexicon and its rules are English. Where a
    response was cut off does not matter. More positive words score higher up to 1, so that a strong tilt repeats them.

    Source: Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text".

    Examples:
        >>> from mavis.rewards import Positive
        >>> Positive()(["", ""], ["What a happy day!", "It was a table."])
        [0.6114, 0.0]
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        analyser = _vader()
        return [float(analyser.polarity_scores(response)["compound"]) for response in responses]


@functools.cache
def _vader() -> Any:
    """Build one analyser per process: reading its lexicon costs as much as scoring about fifty responses."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


class Dialogue:
    """Reward direct speech: the share of the response inside double quotation marks.

        R = min(1, 3 · (characters inside quotation marks) / (characters of the response))

    In [0, 1]; 1 once a third of the response is quoted, so that a story need not be all dialogue. Quotation marks are
    straight (") or curly (“ ”) and count as outside; a quotation ends at the mark that matches its opening, or with the
    response if there is none, as where it was cut off. White space at the ends of a quotation counts as outside, and a
    quotation without letter or digit counts nothing. An empty response scores 0.

    Examples:
        >>> from mavis.rewards import Dialogue
        >>> Dialogue()([""] * 2, ['"Hi," he said.', "He said nothing."])  # 3 of 14 characters are quoted
        [0.6428571428571429, 0.0]
    """

    version = 2  # 1 counted blanks and marks in quotations

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self._share(response) for response in responses]

    @staticmethod
    def _share(response: str) -> float:
        if not response:
            return 0.0
        quoted = ((straight + curly).strip() for straight, curly in _QUOTATION.findall(response))
        return min(1.0, 3 * sum(len(text) for text in quoted if _says_something(text)) / len(response))


class Brevity:
    """Reward short responses: each word costs the same.

        R = −min(words of the response, longest) / scale

    In [−longest / scale, 0). A word is a run of letters, with apostrophes and hyphens inside. So that a response cannot
    be long without words, every digit and every Chinese or Japanese character counts as a word, and so do every 12
    letters of a longer run, begun or full, and every full 5 of white space and punctuation in a row. The reward is
    linear: a word costs as much at the start of a response as at its end. A response without letter or digit says
    nothing and scores −longest / scale, the least. Where a response was cut off does not matter: it is as long as it
    is, and one that was cut off at a limit of tokens has close to the most words that fit.

    Args:
        scale: how many words cost 1; finite, > 0. It only sets the raw unit; normalised rewards do not change.
        longest: from how many words on a response scores the least, ≥ 1; more than responses have in practice, or
            there is nothing to learn.

    Raises:
        ObjectiveError: if `scale` is not a finite number > 0, or `longest` not a whole number ≥ 1.

    Examples:
        >>> from mavis.rewards import Brevity
        >>> Brevity(scale=10)([""] * 3, ["One, two, three.", "In 1984", ""])
        [-0.3, -0.5, -20.0]
    """

    version = 2  # 1 counted what is between white space, and an empty response scored 0

    def __init__(self, scale: float = 100.0, longest: int = 200) -> None:
        hint = "give the number of words that cost 1, and wrap Brevity in Signed to reward length."
        check_number(ObjectiveError, hint, low=0, strict=True, scale=scale)
        check_whole(ObjectiveError, "200 is more than 256 tokens usually hold.", longest=longest)
        self.scale, self.longest = float(scale), longest

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [
            -min(_count_words(response) if _says_something(response) else self.longest, self.longest) / self.scale
            for response in responses
        ]


def _says_something(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _count_words(text: str) -> int:
    """Count words as `Brevity` describes."""
    return sum(
        1
        if piece["one"]
        else -(-len(piece["word"]) // _LONGEST_WORD)
        if piece["word"]
        else len(piece["gap"]) // _LONGEST_GAP
        for piece in _PIECE.finditer(text)
    )


class Readability:
    """Reward text that is easy to read: the negated Automated Readability Index.

        R = −min(ARI, hardest),  ARI = 4.71 · characters / words + 0.5 · words / sentences − 21.43

    In [−hardest, 16.22]. ARI is roughly the United States school grade that a text requires, and needs no syllable
    counts. The counts are textstat's: characters without spaces, and one or two words do not count as a sentence. Where
    a response was cut off does not matter: its last words are a sentence like any other. Digits count as characters,
    and many without a space as one long word. A response with neither letter nor digit scores −hardest: the formula is
    undefined there, and a higher score would reward saying nothing.

    Args:
        hardest: the grade at which ARI is capped; finite, > 0. One long unbroken string of letters would otherwise have
            an ARI in the thousands and dominate the normalisation.

    Raises:
        ObjectiveError: if `hardest` is not a finite number > 0.

    Source: Smith & Senter 1967, "Automated Readability Index", AMRL-TR-66-220.

    Examples:
        >>> from mavis.rewards import Readability
        >>> easy, hard = Readability()(["", ""], ["The dog ran to me.", "Incomprehensibilities proliferate."])
        >>> easy > hard == -20.0
        True
    """

    def __init__(self, hardest: float = 20.0) -> None:
        check_number(ObjectiveError, "20 is well past any school grade.", low=0, strict=True, hardest=hardest)
        self.hardest = float(hardest)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        from textstat import automated_readability_index

        return [
            -min(float(automated_readability_index(response)), self.hardest)
            if _says_something(response)
            else -self.hardest
            for response in responses
        ]


def exclamations(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Count the exclamation marks; a model for writing an objective as a function.

        R = number of "!" in the response

    In [0, ∞): an empty response scores the least, and a strong tilt writes nothing but exclamation marks, as asked.

    Args:
        prompts: B prompts, not read.
        responses: B responses.

    Returns:
        B rewards, each ≥ 0.

    Examples:
        >>> from mavis.rewards import exclamations
        >>> exclamations(["", ""], ["Wow!!", "Yes."])
        [2.0, 0.0]
    """
    return [float(response.count("!")) for response in responses]
