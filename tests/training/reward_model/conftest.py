"""Preference pairs that a tiny model can learn: the better response says something good."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mavis.data import Pair

GOOD, BAD = ("good", "great", "happy", "love"), ("bad", "sad", "awful", "hate")
REST = ("the", "dog", "cat", "girl", "boy", "was", "and", "house", "tree", "ball")

MakePairs = Callable[..., list[Pair]]


@pytest.fixture
def make_pairs() -> MakePairs:
    """A function that makes pairs of four to nine words, each about a prompt of its own."""

    def make(count: int, *, chat: bool = False, seed: int = 0, longer: bool = False) -> list[Pair]:
        draw = random.Random(seed)

        def text(words: tuple[str, ...], extra: int = 0) -> str:
            chosen = [draw.choice(REST) for _ in range(draw.randint(3, 8) + extra)]
            chosen.insert(draw.randrange(len(chosen)), draw.choice(words))
            return " ".join(chosen)

        pairs = []
        for index in range(count):
            said = f"{' '.join(draw.choice(REST) for _ in range(4))} {index}"
            prompt = [{"role": "user", "content": said}] if chat else f"{said} "
            pairs.append(Pair(prompt, text(GOOD, 4 if longer else 0), text(BAD)))
        return pairs

    return make
