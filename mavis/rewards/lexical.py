"""Objectives that read the response's text alone: no model, no network, well under a millisecond each."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from mavis.errors import ObjectiveError

# A quotation ends at the mark that matches its opening mark, or where the response ends.
_QUOTATION = re.compile(r'"([^"]*)"?|“([^”]*)”?')


class Positive:
    """Reward positive wording: the compound score of VADER.

        R = s / √(s² + 15),  s the sum of the words' valences after VADER's rules

    In [−1, 1]; 0 where no word carries sentiment. The lexicon and its rules are English.

    Source: Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text".
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        analyser = _vader()
        return [float(analyser.polarity_scores(response)["compound"]) for response in responses]


@functools.cache
def _vader() -> Any:
    """One analyser per process: reading its lexicon costs as much as scoring some fifty responses."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


class Dialogue:
    """Reward direct speech: the share of the response inside double quotation marks.

        R = min(1, 3 · (characters inside quotation marks) / (characters of the response))

    In [0, 1]; 1 from a third of the response on, so that a story need not be all talk. Quotation marks are
    straight (") or curly (“ ”) and count as outside; a quotation ends at the mark that matches its opening,
    or with the response if there is none. An empty response scores 0.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [self._one(response) for response in responses]

    @staticmethod
    def _one(response: str) -> float:
        if not response:
            return 0.0
        inside = sum(len(straight) + len(curly) for straight, curly in _QUOTATION.findall(response))
        return min(1.0, 3 * inside / len(response))


class Brevity:
    """Reward short responses: each word costs the same.

        R = −(words of the response) / scale

    In (−∞, 0]; words are what white space separates, and an empty response scores 0. It is linear, so a word
    costs as much at the start of a response as at its end.

    Args:
        scale: how many words cost 1; finite, > 0. It sets the raw unit only: normalised rewards stay.

    Raises:
        ObjectiveError: if `scale` is not a finite number above 0.
    """

    def __init__(self, scale: float = 100.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ObjectiveError(
                f"scale is {scale!r}, but it must be finite and above 0.",
                "give the number of words that cost 1, and wrap Brevity in Signed to reward length.",
            )
        self.scale = float(scale)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        # 0.0 − x, for −x would make an empty response −0.0.
        return [0.0 - len(response.split()) / self.scale for response in responses]


class Readability:
    """Reward text that is easy to read: the Automated Readability Index, turned round.

        R = −min(ARI, hardest),  ARI = 4.71 · characters / words + 0.5 · words / sentences − 21.43

    In [−hardest, 16.22]. ARI is roughly the United States school grade that a text asks for, and needs no
    syllables. The counts are textstat's: characters without spaces, and a sentence of one or two words is no
    sentence. A response with neither letter nor digit cannot be read and scores −hardest: the formula is
    undefined there, and anything higher would reward saying nothing.

    Args:
        hardest: the grade at which text stops counting as harder; finite, > 0. One unbroken string of letters
            would otherwise have an ARI in the thousands, and normalisation would see nothing else.

    Raises:
        ObjectiveError: if `hardest` is not a finite number above 0.

    Source: Smith & Senter 1967, "Automated Readability Index", AMRL-TR-66-220.
    """

    def __init__(self, hardest: float = 20.0) -> None:
        if not (math.isfinite(hardest) and hardest > 0):
            raise ObjectiveError(
                f"hardest is {hardest!r}, but it must be finite and above 0.",
                "20 is well past any school grade.",
            )
        self.hardest = float(hardest)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        from textstat import automated_readability_index

        return [
            -min(float(automated_readability_index(response)), self.hardest)
            if any(character.isalnum() for character in response)
            else -self.hardest
            for response in responses
        ]


def exclamations(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Count the exclamation marks: the smallest objective, and the pattern for a function of your own.

        R = number of "!" in the response

    Args:
        prompts: B prompts, not read.
        responses: B responses.

    Returns:
        B rewards, each ≥ 0.
    """
    return [float(response.count("!")) for response in responses]
