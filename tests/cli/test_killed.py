"""`mavis train` killed at random instants and rerun: the same critic bit for bit, and nothing left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL

# One process imports everything and forks the runs, as imports take longer than the training.
FORKER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import mavis.evaluation, mavis.training, mavis.rewards, mavis.cli.train
from mavis.cli import main

def start(folder):
    if (child := os.fork()) == 0:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        status = 1
        try:
            status = main(["train", *json.loads(sys.argv[2]), f"output={folder}"])
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)
    return child

def finish(child):
    return os.waitpid(child, 0)[1]

root = Path(sys.argv[1])
for name in ("warm", "whole"):
    began = time.perf_counter()
    assert finish(start(root / name)) == 0
    seconds = time.perf_counter() - began
draw, killed = random.Random(0), 0
while killed < int(sys.argv[3]):
    run = root / f"run-{killed}"
    child = start(run)
    time.sleep(draw.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    if finish(child) == signal.SIGKILL:
        assert finish(start(run)) == 0, run
        killed += 1
    else:  # it had ended before, on a machine that has become less busy
        seconds *= 0.9
        shutil.rmtree(run)
"""
KILLS = 25


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_training_killed_at_random_instants_ends_with_the_same_critic(tiny_folder: Path, tmp_path: Path) -> None:
    overrides = ["policy=pretrained", f"policy.path={tiny_folder}", *SMALL[1:]]
    arguments = [str(tmp_path), json.dumps(overrides), str(KILLS)]
    subprocess.run([sys.executable, "-c", FORKER, *arguments], check=True)
    for number in range(KILLS):
        assert contents(tmp_path / f"run-{number}" / "critic") == contents(tmp_path / "whole" / "critic")
        assert names(tmp_path / f"run-{number}") == names(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))
