"""Interruptions: after a killed process, a full disk or Ctrl-C, files are whole and the run resumes.

The objective `mishap` of `job.py` fails once, as its marker says, in the last process while it scores a second shard.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from mavis.critics import Critic, HiddenStateCritic
from mavis.rollouts import RolloutSettings
from mavis.training import ImprovementSettings, improve
from mavis.training.improvement.fit import FitSettings

PATIENCE = 120  # seconds; waiting processes would otherwise hang for a day


@pytest.fixture(scope="module")
def start(train: Callable[..., Any]) -> Callable[..., Any]:
    """A function that starts a training which fails once as `what` says, or not at all."""

    def launch(name: str, where: Path, what: str = "", **options: Any) -> Any:
        if what:
            (where / "marker").write_text(what)
        objective = ["+objectives.mishap._target_=job.Mishap", f"+objectives.mishap.marker={where / 'marker'}"]
        return train(name, where, *objective, "output=run", **options)

    return launch


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a job to end; neither the launcher nor its processes may be left."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return process.returncode, out, err
            time.sleep(0.1)
        raise AssertionError("something of the job is still running")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def assert_whole(run: Path) -> int:
    """Load all finished files; return the number of shards."""
    shards = [path for path in run.rglob("shard-*") if not path.name.startswith(".")]
    for path in shards:
        assert len(datasets.load_from_disk(str(path))) > 0
    for path in run.rglob("config.json"):
        if not any(part.startswith(".") for part in path.relative_to(run).parts):
            Critic.from_pretrained(path.parent)
    return len(shards)


def rollouts(run: Path) -> list[Any]:
    """All responses of both iterations."""
    shards = [datasets.load_from_disk(str(p)) for p in sorted(run.glob("iteration-*/rollouts/shard-*"))]
    return [ids for shard in shards for ids in shard["response_ids"]]


@pytest.mark.slow
def test_a_run_interrupted_in_every_way_ends_as_an_uninterrupted_one(
    start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same command each time, by two processes or by one."""
    calm, where = tmp_path_factory.mktemp("calm"), tmp_path_factory.mktemp("where")
    expected, run = calm / "run", where / "run"
    code, _, err = ended(start("alone", calm))
    assert code == 0, err

    # A process is killed: the launcher reports it and ends the others.
    code, _, err = ended(start("accelerate", where, "killed"))
    assert code != 0
    assert "SIGKILL" in err
    assert 0 < assert_whole(run) < 8
    assert not (run / "iteration-1").exists()
    first = {path: path.stat().st_mtime_ns for path in run.rglob("shard-*/state.json")}

    # An objective returns the wrong number of scores in one process: that one reports it, and all end.
    code, _, err = ended(start("torchrun", where, "wrong"))
    assert code != 0
    assert re.search(r"^mavis \(process 1 of 2\): objective 'mishap' .*Hint: ", err, flags=re.MULTILINE), err
    assert assert_whole(run) > len(first)

    # Ctrl-C, as a terminal sends it: to all of the job.
    for name in ("torchrun", "alone"):
        job = start(name, where, "waits")
        deadline = time.monotonic() + PATIENCE
        while (where / "marker").exists() and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT)
        code, _, err = ended(job)
        assert code != 0
        assert not (where / "marker").exists()
        assert name != "alone" or err.count("mavis: interrupted. Hint: finished work is kept") == 1
        assert assert_whole(run) > len(first)

    # A quota: no file may be longer than this, so that shards still fit, but no critic.
    largest = max(path.stat().st_size for path in expected.rglob("*.safetensors"))
    assert all(path.stat().st_size < largest for path in expected.rglob("*.arrow"))
    limits = (resource.RLIMIT_FSIZE, (largest - 1, largest - 1))
    code, _, err = ended(start("alone", where, preexec_fn=lambda: resource.setrlimit(*limits)))
    assert code == 2
    assert re.search(r"^mavis: .*File too large.* Hint: finished work is kept", err, flags=re.MULTILINE), err
    assert "Traceback" not in err
    assert_whole(run)
    assert not (run / "critic").exists()

    # No interruption: the run resumes and ends.
    code, out, err = ended(start("accelerate", where))
    assert code == 0, err
    assert out.count("critic: ") == out.count("J = reward") == 1  # one process prints
    assert len(list(run.glob("*.log"))) == len(list(run.glob(".hydra"))) == 1
    assert {path: path.stat().st_mtime_ns for path in first} == first  # finished shards were never sampled again
    assert_whole(run)
    assert rollouts(run) == rollouts(expected)
    state = Critic.from_pretrained(expected / "critic").state_dict()
    for key, value in Critic.from_pretrained(run / "critic").state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-4)


class FullDisk:
    """Passes some calls of a function of `os` through, then fails as on a full disk."""

    def __init__(self, function: Callable[..., Any], passing: int) -> None:
        self.function, self.passing, self.refused = function, passing, 0

    def __call__(self, *arguments: Any) -> Any:
        if self.passing == 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.passing -= 1
        return self.function(*arguments)


@pytest.fixture
def run(tiny_policy: Any, tiny_tokenizer: Any, tiny_objectives: Any) -> Callable[[Path], HiddenStateCritic]:
    """A short training in this process."""
    settings = ImprovementSettings(
        iterations=2,
        rollouts=12,
        calibration_samples=1,
        sampling=RolloutSettings(max_new_tokens=4, top_k=20, shard_size=6),
        fit=FitSettings(epochs=1, batch_size=4),
    )

    def call(folder: Path) -> HiddenStateCritic:
        critic = HiddenStateCritic.for_policy(tiny_policy, ["good", "brevity"], hidden=8, rank=4)
        list(improve(tiny_policy, tiny_tokenizer, critic, tiny_objectives, ["the dog", "she"], folder, settings))
        return critic

    return call


@pytest.fixture
def room() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_full_at_any_write_leaves_whole_files_and_the_run_resumes(
    run: Any, tmp_path: Path, room: pytest.MonkeyPatch, call: str
) -> None:
    expected = run(tmp_path / "uninterrupted")
    real = getattr(os, call)
    for attempts in range(100):
        disk = FullDisk(real, passing=12 * min(attempts, 1))  # room for a little more each time
        room.setattr(os, call, disk)
        try:
            critic = run(tmp_path / "run")
            break
        except OSError:
            assert disk.refused > 0
        finally:
            room.setattr(os, call, real)
        assert_whole(tmp_path / "run")
        assert not list((tmp_path / "run").rglob(".*"))  # no temporary file is left
    assert attempts > 3
    for key, value in expected.state_dict().items():
        assert torch.equal(critic.state_dict()[key], value), key
    assert critic.calibration == expected.calibration
