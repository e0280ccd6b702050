"""Runs of `generate` in turn give what each gives alone, and each is charged with its own time only."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis import HiddenStateCritic, MavisTilt, ValueModelCritic, embedded

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from lib import in_turn

    return in_turn


class Clock:
    """Time that passes only where a run says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_each_run_is_charged_with_its_own_steps(in_turn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(in_turn, "time", clock)
    order: list[str] = []

    def run(name: str, prompt: float, steps: list[float]) -> Callable[[Any], None]:
        def generate(end_of_step: Any) -> None:
            clock.now += prompt
            for seconds in steps:
                order.append(name)
                clock.now += seconds
                stops = end_of_step(torch.zeros(2, 3), torch.zeros(2, 5))
                assert stops.tolist() == [False, False]
            clock.now += 0.25  # what is left to do after the last step

        return generate

    runs = {"short": run("short", 1.0, [1.0, 2.0]), "long": run("long", 0.0, [4.0] * 10), "none": run("none", 8.0, [])}
    assert in_turn.seconds_in_turn(runs, 0) == {"short": 4.25, "long": 40.25, "none": 8.25}
    assert order.count("short") == 2
    assert order[:4] == ["short", "long", "long", "short"]  # a step each before anyone's second
    assert order[4:] == ["long"] * 8


@pytest.mark.parametrize("turn", [0, 1])
def test_the_order_is_turned_round_after_every_turn(in_turn: Any, turn: int) -> None:
    order: list[int] = []

    def run(name: int) -> Callable[[Any], None]:
        def generate(end_of_step: Any) -> None:
            for _ in range(4):
                order.append(name)
                end_of_step(torch.zeros(1, 1), torch.zeros(1, 1))

        return generate

    in_turn.seconds_in_turn({str(name): run(name) for name in range(3)}, turn)
    there, back = [0, 1, 2], [2, 1, 0]
    assert order == (back + there + back + there if turn else there + back + there + back)


def test_tilts_in_turn_give_the_tokens_that_each_gives_alone(in_turn: Any) -> None:
    policy, _ = embedded.load()
    ids = torch.randint(3, policy.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    twins = {name: in_turn.twin(policy) for name in ("plain", "hidden", "value model")}
    critics: dict[str, Any] = {
        "hidden": HiddenStateCritic.for_policy(policy, ["a", "b"]),
        "value model": ValueModelCritic.for_policy(policy, ["a", "b"]),
    }
    for seed, (name, critic) in enumerate(critics.items()):
        torch.manual_seed(seed)
        torch.nn.init.normal_(critic.heads.outer, std=1.0)
        critic.attach(twins[name])
    found: dict[str, torch.Tensor] = {}

    def run(name: str, key: str, *end_of_step: Any) -> None:
        tilt = [MavisTilt([3.0, -1.0], critics[name], beta=1.0)] if name in critics else []
        found[key] = twins[name].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            logits_processor=tilt,
            stopping_criteria=[*end_of_step],
        )

    for name in twins:
        run(name, f"{name} alone")
    in_turn.seconds_in_turn({name: lambda end, name=name: run(name, name, end) for name in twins}, 0)
    for name in twins:
        assert torch.equal(found[name], found[f"{name} alone"])
    assert len({tuple(found[name].flatten().tolist()) for name in twins}) == 3  # three different distributions
    assert torch.is_grad_enabled()


def test_a_twin_shares_weights_and_nothing_else(in_turn: Any) -> None:
    policy, _ = embedded.load()
    twin = in_turn.twin(policy)
    ours, theirs = dict(policy.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    fired: list[int] = []
    twin.register_forward_hook(lambda *_: fired.append(1))
    ids = torch.tensor([[random.randrange(3, 9)]])
    assert torch.equal(policy(ids).logits, twin(ids).logits)
    assert fired == [1]


def test_a_run_that_fails_ends_the_others_and_says_so(in_turn: Any) -> None:
    ended: list[str] = []

    def fails(end_of_step: Any) -> None:
        end_of_step(torch.zeros(1, 1), torch.zeros(1, 1))
        raise ValueError("no room")

    def goes_on(end_of_step: Any) -> None:
        with torch.no_grad():  # as `generate` does, and has to leave it
            try:
                for _ in range(3):
                    end_of_step(torch.zeros(1, 1), torch.zeros(1, 1))
                ended.append("whole")
            finally:
                ended.append("left")

    with pytest.raises(ValueError, match="no room"):
        in_turn.seconds_in_turn({"a": fails, "b": goes_on}, 0)
    assert ended == ["left"]
    assert torch.is_grad_enabled()


def test_a_case_is_told_as_a_share_of_the_plain_run_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_decode

    seconds = iter([(9.0, 1.0), (9.0, 1.0), (2.0, 2.5), (2.0, 2.0), (3.0, 4.0), (4.0, 4.0), (6.0, 12.0), (4.0, 8.0)])
    made: list[dict[str, int]] = []

    def in_turn(runs: dict[str, Any], turn: int) -> dict[str, float]:
        tokens = {
            name: run(end_of_step=lambda ids, scores, **_: torch.zeros(len(ids)) > 0) for name, run in runs.items()
        }
        assert tokens == {"plain": None, "own": None}
        hooks = {name: len(run.args[0].get_output_embeddings()._forward_pre_hooks) for name, run in runs.items()}
        made.append(hooks)
        return dict(zip(("plain", "own"), next(seconds), strict=True))

    monkeypatch.setattr(bench_decode, "seconds_in_turn", in_turn)
    arguments = argparse.Namespace(new_tokens=5, repeats=3)
    ways = bench_decode.Ways(bench_decode.load("embedded"))
    rows = bench_decode.speed_rows("embedded", ways, [bench_decode.HIDDEN[0], None], 4, 6, arguments)
    # The first round is not counted; of the others the median of 0.8, 0.75 and 0.5, and of 1, 1 and 0.5.
    assert [(row["what"], row["critic"], row["ratio"]) for row in rows] == [
        ("speed", "hidden_state", 0.75),
        ("control", None, 1.0),
    ]
    assert rows[0]["ratio_quartiles"] == [0.625, 0.775]
    assert (rows[0]["tokens_per_second"], rows[0]["plain_tokens_per_second"]) == (20 / 4.0, 20 / 3.0)
    assert [hooks["plain"] for hooks in made] == [0] * 8  # what is hooked into the case's twin costs plain nothing
    assert [hooks["own"] > 0 for hooks in made] == [True, False] * 4
    assert "embedded batch 4 context 6 plain: 1.000" in capsys.readouterr().out
