"""Speeds are compared between two plain runs; the warm-up is not counted; medians over the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mavis.evaluation import speed
from mavis.evaluation.speed import compare_speed

INPUTS = {"input_ids": torch.zeros(4, 3, dtype=torch.long), "attention_mask": torch.ones(4, 3, dtype=torch.long)}


class Clock:
    """Time that passes only while the stub generates."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Policy:
    """A stub that takes the given seconds, call by call, and records its arguments."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds, self.calls = clock, iter(seconds), []
        self.generation_config = GenerationConfig(num_beams=4, max_time=0.1, top_p=0.5)

    def generate(self, **arguments: Any) -> None:
        self.calls.append(arguments)
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def test_each_method_is_compared_with_the_plain_runs_before_and_after_it(clock: Clock) -> None:
    tilt = object()
    # The machine slows down all the time; the tilted method always takes 1.25 times as long as plain decoding would.
    repeats = [(100.0, 1.0, 7.0), (1.0, 2.5, 3.0), (4.0, 6.25, 6.0), (8.0, 20.0, 24.0)]
    policy = Policy(clock, [seconds for runs in repeats for seconds in runs])
    found = compare_speed(policy, INPUTS, {"tilted": lambda: tilt}, new_tokens=10, repeats=3)  # type: ignore[dict-item]
    assert found == {
        "plain": {"tokens_per_second": pytest.approx(40 / 4.0), "ratio": 1.0},
        "tilted": {"tokens_per_second": pytest.approx(40 / 6.25), "ratio": pytest.approx(0.8)},
    }
    assert [call["logits_processor"] for call in policy.calls] == [[], tilt, []] * 4


def test_every_method_samples_the_same_number_of_tokens(clock: Clock) -> None:
    policy = Policy(clock, [1.0] * 10)
    compare_speed(policy, INPUTS, {"a": lambda: None, "b": lambda: None}, new_tokens=7, repeats=1)
    assert len(policy.calls) == 10
    for call in policy.calls:
        config = call["generation_config"]
        assert (config.min_new_tokens, config.max_new_tokens) == (7, 7)
        assert (config.do_sample, config.top_k, config.top_p) == (True, 0, 1.0)
        assert (config.num_beams, config.max_time) == (1, float("inf"))
        assert call["input_ids"] is INPUTS["input_ids"]


def test_each_repeat_has_its_own_tilt(clock: Clock) -> None:
    made: list[object] = []

    def make() -> Any:
        made.append(object())
        return made[-1]

    policy = Policy(clock, [1.0] * 9)
    compare_speed(policy, INPUTS, {"tilted": make}, new_tokens=2, repeats=2)
    assert [call["logits_processor"] for call in policy.calls if call["logits_processor"]] == made
    assert len(set(map(id, made))) == 3
