"""Fixtures that launch jobs of one and of two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = Path(__file__).with_name("job.py")


def launcher(name: str) -> list[str]:
    """The start of a command that launches one process, or two in one of the supported ways."""
    if name == "alone":
        return [sys.executable]
    if name == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stage = name.removeprefix("deepspeed ")
    way = ["--multi_gpu"] if stage == name else ["--use_deepspeed", "--zero_stage", *stage.split()]
    options = [*way, "--num_processes", "2", "--main_process_port", "0"]  # any port that is free
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(JOB.parent)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def job(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that runs `job.py` by a launcher and returns its output folder."""

    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp("job")
        done = subprocess.run(
            [*launcher(name), str(JOB), str(tiny_folder), str(out)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return out

    return run


@pytest.fixture(scope="session")
def command() -> Callable[..., Any]:
    """A function that starts a command of `mavis` by a launcher, in a process group of its own."""

    def prepare(further: Callable[[], None] | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore it
        if further is not None:
            further()

    def start(name: str, where: Path, module: str, *overrides: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*launcher(name), "-m", f"mavis.cli.{module}", *overrides],
            cwd=where,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options | {"preexec_fn": lambda: prepare(options.get("preexec_fn"))},
        )

    return start


@pytest.fixture(scope="session")
def train(command: Callable[..., Any], tiny_folder: Path) -> Callable[..., Any]:
    """A function that starts `mavis train` on the tiny policy by a launcher."""
    small = (
        "policy=pretrained",
        f"policy.path={tiny_folder}",
        "objective=[positive,brevity]",
        "critic.hidden=8",
        "critic.rank=4",
        "decoding.max_new_tokens=8",
        "decoding.top_k=20",
        "improvement.iterations=2",
        "improvement.rollouts=32",
        "improvement.shard_size=4",
        "improvement.calibration_samples=2",
        "improvement.fit.epochs=1",
    )

    def start(name: str, where: Path, *overrides: str, **options: Any) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = command(name, where, "train", *small, *overrides, **options)
        return process

    return start
