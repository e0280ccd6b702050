"""Progress of long commands: bars on a terminal, sparse lines where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TextIO

from mavis.distributed import join_processes

Progress = Callable[[str, int, int], None]
"""Called with a stage, the number of units done and their total."""

LINE_INTERVAL = 60.0
"""Minimum time in seconds between two lines of one stage, except for its first and last."""


@contextmanager
def progress_reporter() -> Iterator[Progress]:
    """Yield a function that reports progress on standard error: a bar per stage on a terminal, else lines.

    Several runs of a sweep that share one terminal report in lines, too. Of several processes only the main one
    reports.
    """
    from mavis.cli.run_status import run_label

    if not join_processes().is_main:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty() and run_label() is None:
        with _progress_bars() as update:
            yield update
    else:
        yield ProgressLines(label=run_label() or "").update


@dataclass
class _Stage:
    start: float
    done_at_start: int
    printed: float
    """When its latest line was printed."""
    finished: bool = False


class ProgressLines:
    """Reports progress in lines: the first and the last of each stage, and between them at most one per interval.

        stage  done/total  elapsed 0:03:20  remaining 0:01:10

    Args:
        stream: where to; None is the standard error of the moment.
        clock: seconds since any point in time.
        interval: minimum time in seconds between two lines of a stage.
        label: what each line begins with, to tell runs on one terminal apart; empty for nothing.

    Examples:
        >>> import io
        >>> from mavis.cli.progress import ProgressLines
        >>> stream, times = io.StringIO(), iter([0.0, 30.0, 200.0, 270.0])
        >>> lines = ProgressLines(stream, clock=lambda: next(times))
        >>> for done in (0, 10, 74, 100):
        ...     lines.update("rollouts", done, 100)
        >>> print(stream.getvalue(), end="")
        rollouts  0/100  elapsed 0:00:00  remaining unknown
        rollouts  74/100  elapsed 0:03:20  remaining 0:01:10
        rollouts  100/100  elapsed 0:04:30  remaining 0:00:00
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        interval: float = LINE_INTERVAL,
        label: str = "",
    ) -> None:
        self._stream, self._clock, self._interval = stream, clock, interval
        self._prefix = f"{label}  " if label else ""
        self._stages: dict[str, _Stage] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of a stage are done."""
        now, is_last = self._clock(), done >= total
        state = self._stages.get(stage)
        if state is None:
            state = self._stages[stage] = _Stage(start=now, done_at_start=done, printed=now)
        elif state.finished or not (is_last or now - state.printed >= self._interval):
            return
        state.printed, state.finished = now, is_last
        elapsed = now - state.start
        progressed = done - state.done_at_start
        remaining = _duration(elapsed / progressed * (total - done)) if progressed > 0 else "unknown"
        print(
            f"{self._prefix}{stage}  {done}/{total}  elapsed {_duration(elapsed)}  "
            f"remaining {_duration(0) if is_last else remaining}",
            file=self._stream or sys.stderr,
            flush=True,
        )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    # While it draws, rich would send what is printed to standard output to its own console, standard error.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as bars:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield update
