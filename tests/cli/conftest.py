"""The command line, run within the test's own process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from mavis.cli import main
from tests.processes import restored_process


@dataclass
class Ran:
    """The outcome of a command."""

    code: int
    out: str
    err: str


class Mavis:
    """Runs `mavis` in a folder of its own, on the tiny policy where `policy=tiny` is asked for."""

    def __init__(self, policy: Path, folder: Path) -> None:
        self.policy, self.folder = policy, folder

    def __call__(self, *arguments: str, stdin: str = "") -> Ran:
        given = [f"policy=pretrained|policy.path={self.policy}" if a == "policy=tiny" else a for a in arguments]
        given = [part for argument in given for part in argument.split("|")] if "policy=tiny" in arguments else given
        out, err = io.StringIO(), io.StringIO()
        with restored_process(self.folder), redirect_stdout(out), redirect_stderr(err):
            sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
            try:
                code = main(given)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture
def mavis(tiny_folder: Path, tmp_path: Path) -> Mavis:
    """`mavis` as a function of its arguments."""
    return Mavis(tiny_folder, tmp_path)


SMALL = (
    "policy=tiny",
    "objective=[positive,brevity]",
    "critic.hidden=8",
    "critic.rank=4",
    "decoding.max_new_tokens=8",
    "decoding.top_k=20",
    "improvement=independent",
    "improvement.iterations=1",
    "improvement.rollouts=32",
    "improvement.calibration_samples=2",
    "improvement.fit.epochs=1",
)


EVALUATION = (
    "evaluation.samples=2",
    "evaluation.reference_samples=64",
    "evaluation.betas=[1.0]",
    "evaluation.divisions=1",
    "evaluation.speed_repeats=0",
    "output=report",
)
"""Overrides that make an evaluation small."""


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Overrides that make a training as small as it can be."""
    return SMALL


@pytest.fixture(scope="session")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a critic that `mavis train` made of the tiny policy."""
    folder = tmp_path_factory.mktemp("trained")
    ran = Mavis(tiny_folder, folder)("train", *SMALL, "output=run")
    assert ran.code == 0, ran.err
    return folder / "run" / "critic"
