"""Progress without a terminal: which lines are printed, when, and where to."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest

from mavis.cli.progress import ProgressLines, progress_reporter


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock) -> Callable[..., list[str]]:
    """A function from updates, `(seconds, stage, done, total)` each, to the lines that they print."""

    def printed(*updates: tuple[float, str, int, int], **options: Any) -> list[str]:
        stream, start = io.StringIO(), clock.now
        progress = ProgressLines(stream, clock=clock, **options)
        for seconds, stage, done, total in updates:
            clock.now = start + seconds
            progress.update(stage, done, total)
        return stream.getvalue().splitlines()

    return printed


def test_a_line_holds_stage_units_elapsed_and_remaining_time(lines: Callable[..., list[str]]) -> None:
    assert lines((0, "rollouts", 0, 100), (200, "rollouts", 74, 100)) == [
        "rollouts  0/100  elapsed 0:00:00  remaining unknown",
        "rollouts  74/100  elapsed 0:03:20  remaining 0:01:10",
    ]


def test_the_first_and_the_last_line_are_always_printed(lines: Callable[..., list[str]]) -> None:
    assert lines((0, "fit", 1, 3), (1, "fit", 2, 3), (2, "fit", 3, 3)) == [
        "fit  1/3  elapsed 0:00:00  remaining unknown",
        "fit  3/3  elapsed 0:00:02  remaining 0:00:00",
    ]


def test_a_stage_prints_at_most_once_a_minute_in_between(lines: Callable[..., list[str]]) -> None:
    updates = [(seconds, "sweep", seconds, 1000) for seconds in range(1001)]
    printed = lines(*updates)
    done = [int(line.split("  ")[1].partition("/")[0]) for line in printed]
    assert done == [*range(0, 1000, 60), 1000]
    assert printed[1] == "sweep  60/1000  elapsed 0:01:00  remaining 0:15:40"


def test_slow_units_are_printed_as_they_come(lines: Callable[..., list[str]]) -> None:
    assert len(lines(*((90.0 * done, "slow", done, 4) for done in range(5)))) == 5


def test_stages_are_timed_apart(lines: Callable[..., list[str]]) -> None:
    assert lines((0, "one", 0, 1), (500, "one", 1, 1), (500, "two", 0, 2), (510, "two", 2, 2)) == [
        "one  0/1  elapsed 0:00:00  remaining unknown",
        "one  1/1  elapsed 0:08:20  remaining 0:00:00",
        "two  0/2  elapsed 0:00:00  remaining unknown",
        "two  2/2  elapsed 0:00:10  remaining 0:00:00",
    ]


def test_units_that_were_done_before_do_not_count_in_the_estimate(lines: Callable[..., list[str]]) -> None:
    # Ten units in 100 seconds, ten are left, whatever an interrupted run had done.
    assert lines((0, "rollouts", 80, 100), (100, "rollouts", 90, 100))[-1].endswith("remaining 0:01:40")


def test_a_stage_that_is_done_already_is_one_line(lines: Callable[..., list[str]]) -> None:
    assert lines((0, "sweep", 5, 5), (100, "sweep", 5, 5)) == ["sweep  5/5  elapsed 0:00:00  remaining 0:00:00"]


def test_runs_on_one_terminal_are_labelled(lines: Callable[..., list[str]]) -> None:
    assert lines((0, "fit", 1, 1), label="beta=2") == ["beta=2  fit  1/1  elapsed 0:00:00  remaining 0:00:00"]


def test_every_line_is_flushed(clock: Clock) -> None:
    class Stream(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed = len(self.getvalue())

    stream = Stream()
    ProgressLines(stream, clock=clock).update("fit", 0, 2)
    assert stream.flushed == len(stream.getvalue()) > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "label", "bars"),
    [(io.StringIO, None, False), (Terminal, None, True), (Terminal, "beta=2", False)],
    ids=["file", "terminal", "several runs on one terminal"],
)
def test_bars_are_for_a_terminal_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], label: str | None, bars: bool
) -> None:
    out, err = io.StringIO(), stream()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("mavis.cli.run_status.run_label", lambda: label)
    monkeypatch.setenv("TERM", "xterm")
    with progress_reporter() as progress:
        progress("fit", 1, 2)
        print("result")
        progress("fit", 2, 2)
    assert out.getvalue() == "result\n"
    assert "fit" in err.getvalue()
    assert ("\x1b[" in err.getvalue()) == bars
    assert bool(re.search(r"fit  2/2  elapsed 0:00:00  remaining 0:00:00\n$", err.getvalue())) == (not bars)


def test_a_command_without_a_terminal_reports_to_standard_error(mavis: Any, small: tuple[str, ...]) -> None:
    ran = mavis("train", *small, "output=run")
    assert ran.code == 0, ran.err
    stages = [line.split("  ")[0] for line in ran.err.splitlines() if "elapsed" in line]
    assert "iteration 0: rollouts" in stages
    assert all(stages.count(stage) <= 2 for stage in stages)
    assert "elapsed" not in ran.out
    generated = mavis(
        "generate", "policy=tiny", "beta=2", "decoding.max_new_tokens=4", "checkpoint=run/critic", "prompt=a"
    )
    assert (generated.code, generated.err) == (0, "")
    assert generated.out.startswith("a")
    assert generated.out.count("\n") == 1
