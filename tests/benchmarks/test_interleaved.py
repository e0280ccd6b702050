"""Interleaved runs of `generate` give what each gives alone, and each is charged with its own time only."""

from __future__ import annotations

import argparse
import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mavis import HiddenStateCritic, MavisTilt, ValueModelCritic, embedded


@pytest.fixture
def interleaved(benchmarks_on_path: None) -> Any:
    return importlib.import_module("lib.interleaved")


class Clock:
    """A clock that only the runs advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_each_run_is_charged_with_its_own_steps(interleaved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(interleaved, "time", clock)
    order: list[str] = []

    def run(name: str, prompt: float, steps: list[float]) -> Callable[[Any], None]:
        def generate(end_of_step: Any) -> None:
            clock.now += prompt
            for seconds in steps:
                order.append(name)
                clock.now += seconds
                stops = end_of_step(torch.zeros(2, 3), torch.zeros(2, 5))
                assert stops.tolist() == [False, False]
            clock.now += 0.25  # work after the last step

        return generate

    runs = {"short": run("short", 1.0, [1.0, 2.0]), "long": run("long", 0.0, [4.0] * 10), "none": run("none", 8.0, [])}
    assert interleaved.time_interleaved(runs, 0) == {"short": 4.25, "long": 40.25, "none": 8.25}
    assert order.count("short") == 2
    assert order[:4] == ["short", "long", "long", "short"]  # one step each before the second step of any
    assert order[4:] == ["long"] * 8


@pytest.mark.parametrize("repeat", [0, 1])
def test_the_order_is_reversed_after_every_turn(interleaved: Any, repeat: int) -> None:
    order: list[int] = []

    def run(name: int) -> Callable[[Any], None]:
        def generate(end_of_step: Any) -> None:
            for _ in range(4):
                order.append(name)
                end_of_step(torch.zeros(1, 1), torch.zeros(1, 1))

        return generate

    interleaved.time_interleaved({str(name): run(name) for name in range(3)}, repeat)
    forward, backward = [0, 1, 2], [2, 1, 0]
    assert order == 2 * (backward + forward if repeat else forward + backward)


def test_interleaved_tilts_give_the_tokens_that_each_gives_alone(interleaved: Any) -> None:
    policy, _ = embedded.load()
    ids = torch.randint(3, policy.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    policies = {name: interleaved.copy_sharing_weights(policy) for name in ("plain", "hidden", "value model")}
    critics: dict[str, Any] = {
        "hidden": HiddenStateCritic.for_policy(policy, ["a", "b"]),
        "value model": ValueModelCritic.for_policy(policy, ["a", "b"]),
    }
    for seed, (name, critic) in enumerate(critics.items()):
        torch.manual_seed(seed)
        torch.nn.init.normal_(critic.heads.outer, std=1.0)
        critic.attach(policies[name])
    found: dict[str, torch.Tensor] = {}

    def run(name: str, key: str, *end_of_step: Any) -> None:
        tilt = [MavisTilt([3.0, -1.0], critics[name], beta=1.0)] if name in critics else []
        found[key] = policies[name].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            logits_processor=tilt,
            stopping_criteria=[*end_of_step],
        )

    for name in policies:
        run(name, f"{name} alone")
    interleaved.time_interleaved({name: lambda end, name=name: run(name, name, end) for name in policies}, 0)
    for name in policies:
        assert torch.equal(found[name], found[f"{name} alone"])
    assert len({tuple(found[name].flatten().tolist()) for name in policies}) == 3  # three different distributions
    assert torch.is_grad_enabled()


def test_a_copy_shares_weights_and_nothing_else(interleaved: Any) -> None:
    policy, _ = embedded.load()
    copy = interleaved.copy_sharing_weights(policy)
    original, shared = dict(policy.named_parameters()), dict(copy.named_parameters())
    assert original.keys() == shared.keys()
    assert all(original[name] is shared[name] for name in original)
    fired: list[int] = []
    copy.register_forward_hook(lambda *_: fired.append(1))
    ids = torch.tensor([[random.randrange(3, 9)]])
    assert torch.equal(policy(ids).logits, copy(ids).logits)
    assert fired == [1]


def test_a_failing_run_stops_the_others_and_raises(interleaved: Any) -> None:
    ended: list[str] = []

    def fails(end_of_step: Any) -> None:
        end_of_step(torch.zeros(1, 1), torch.zeros(1, 1))
        raise ValueError("no room")

    def continues(end_of_step: Any) -> None:
        with torch.no_grad():  # as `generate` does
            try:
                for _ in range(3):
                    end_of_step(torch.zeros(1, 1), torch.zeros(1, 1))
                ended.append("whole")
            finally:
                ended.append("left")

    with pytest.raises(ValueError, match="no room"):
        interleaved.time_interleaved({"a": fails, "b": continues}, 0)
    assert ended == ["left"]
    assert torch.is_grad_enabled()


def test_the_speed_of_a_case_is_relative_to_the_plain_run_of_the_same_repeat(
    benchmarks_on_path: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_decode = importlib.import_module("bench_decode")

    seconds = iter([(9.0, 1.0), (9.0, 1.0), (2.0, 2.5), (2.0, 2.0), (3.0, 4.0), (4.0, 4.0), (6.0, 12.0), (4.0, 8.0)])
    hooked: list[dict[str, int]] = []

    def time_interleaved(runs: dict[str, Any], repeat: int) -> dict[str, float]:
        tokens = {
            name: run(end_of_step=lambda ids, scores, **_: torch.zeros(len(ids)) > 0) for name, run in runs.items()
        }
        assert tokens == {"plain": None, "case": None}
        hooks = {name: len(run.args[0].get_output_embeddings()._forward_pre_hooks) for name, run in runs.items()}
        hooked.append(hooks)
        return dict(zip(("plain", "case"), next(seconds), strict=True))

    monkeypatch.setattr(bench_decode, "time_interleaved", time_interleaved)
    arguments = argparse.Namespace(new_tokens=5, repeats=3)
    lab = bench_decode.Lab(bench_decode.load("embedded"))
    rows = bench_decode.speed_rows("embedded", lab, [bench_decode.HIDDEN[0], None], 4, 6, arguments)
    # The first repeat is a warm-up; of the others the median of 0.8, 0.75 and 0.5, and of 1, 1 and 0.5.
    assert [(row["what"], row["critic"], row["ratio"]) for row in rows] == [
        ("speed", "hidden_state", 0.75),
        ("control", None, 1.0),
    ]
    assert rows[0]["ratio_quartiles"] == [0.625, 0.775]
    assert (rows[0]["tokens_per_second"], rows[0]["plain_tokens_per_second"]) == (20 / 4.0, 20 / 3.0)
    assert [hooks["plain"] for hooks in hooked] == [0] * 8  # the hooks of the case are not in the plain run
    assert [hooks["case"] > 0 for hooks in hooked] == [True, False] * 4
    assert "embedded batch 4 context 6 plain: 1.000" in capsys.readouterr().out
