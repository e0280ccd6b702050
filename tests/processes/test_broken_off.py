"""A process dies, a disk is full, a key is pressed: the job ends, what is on disk is whole, and it goes on.

The objective `mishap` of `job.py` does once what its options say, in the last process, while it scores a second shard.
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

from mavis.critics import HiddenStateCritic, load_critic
from mavis.rollouts import RolloutSettings
from mavis.training import ImprovementSettings, improve
from mavis.training.fit import FitSettings

PATIENCE = 120  # seconds; a hang would be the day that processes wait for each other


def mishap(what: str, where: Path) -> list[str]:
    """Overrides for an objective that does something wrong once."""
    (where / "marker").touch()
    return [
        "+objectives.mishap._target_=job.Mishap",
        f"+objectives.mishap.what={what}",
        f"+objectives.mishap.marker={where / 'marker'}",
        "output=run",
    ]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a job's end; neither the launcher nor anything that it has started may be left."""
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
    """Load all that is there by its own name; returns how many shards that are."""
    shards = [path for path in run.rglob("shard-*") if not path.name.startswith(".")]
    for path in shards:
        assert len(datasets.load_from_disk(str(path))) > 0
    for path in run.rglob("config.json"):
        if not any(part.startswith(".") for part in path.relative_to(run).parts):
            load_critic(path.parent)
    return len(shards)


def rollouts(run: Path) -> list[Any]:
    """All responses of both rounds."""
    shards = [datasets.load_from_disk(str(p)) for p in sorted(run.glob("iteration-*/rollouts/shard-*"))]
    return [ids for shard in shards for ids in shard["response_ids"]]


@pytest.fixture(scope="module")
def unbroken(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process in which nothing goes wrong."""
    where = tmp_path_factory.mktemp("unbroken")
    overrides = mishap("nothing", where)
    (where / "marker").unlink()
    code, _, err = ended(train("alone", where, *overrides))
    assert code == 0, err
    return where / "run"


def assert_goes_on(train: Callable[..., Any], name: str, where: Path, overrides: list[str], unbroken: Path) -> str:
    """Repeat the command; it must end where the unbroken run has ended."""
    code, out, err = ended(train(name, where, *overrides))
    assert code == 0, err
    run = where / "run"
    assert_whole(run)
    assert rollouts(run) == rollouts(unbroken)
    state = load_critic(unbroken / "critic").state_dict()
    for key, value in load_critic(run / "critic").state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-4)
    return str(out)


def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(train: Any, tmp_path: Path, unbroken: Path) -> None:
    overrides = mishap("killed", tmp_path)
    code, _, err = ended(train("accelerate", tmp_path, *overrides))
    assert code != 0
    assert "SIGKILL" in err  # as the launcher says it, and of which process
    assert 0 < assert_whole(tmp_path / "run") < 8
    assert not (tmp_path / "run" / "critic").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("shard-*/state.json")}
    out = assert_goes_on(train, "accelerate", tmp_path, overrides, unbroken)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was there is not sampled again
    assert out.count("critic: ") == out.count("J = reward") == 1  # one process speaks
    assert len(list((tmp_path / "run").glob("*.log"))) == len(list((tmp_path / "run").glob(".hydra"))) == 1


def test_a_mistake_in_one_process_ends_all_is_told_by_the_one_that_met_it_and_one_process_can_go_on(
    train: Any, tmp_path: Path, unbroken: Path
) -> None:
    overrides = mishap("wrong", tmp_path)
    code, _, err = ended(train("torchrun", tmp_path, *overrides))
    assert code != 0
    assert re.search(r"^mavis \(process 1 of 2\): objective 'mishap' .*Hint: ", err, flags=re.MULTILINE), err
    assert assert_whole(tmp_path / "run") > 0
    assert_goes_on(train, "alone", tmp_path, overrides, unbroken)


@pytest.mark.parametrize("name", ["alone", "torchrun"])
def test_breaking_off_by_the_keyboard_leaves_what_goes_on(
    train: Any, tmp_path: Path, unbroken: Path, name: str
) -> None:
    overrides = mishap("waits", tmp_path)
    process = train(name, tmp_path, *overrides)
    deadline = time.monotonic() + PATIENCE
    while (tmp_path / "marker").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the job
    code, _, err = ended(process)
    assert code != 0
    assert name != "alone" or err.count("mavis: interrupted. Hint: what is finished is kept") == 1
    assert assert_whole(tmp_path / "run") > 0
    assert_goes_on(train, "alone", tmp_path, overrides, unbroken)


def test_a_disk_quota_is_told_in_one_line_and_what_was_written_before_stays(
    train: Any, tmp_path: Path, unbroken: Path
) -> None:
    overrides = mishap("nothing", tmp_path)
    (tmp_path / "marker").unlink()
    # No file may be longer than this: shards still fit, what a round's critic is told of itself does not.
    largest = max(path.stat().st_size for path in unbroken.rglob("*.safetensors"))
    assert all(path.stat().st_size < largest for path in unbroken.rglob("*.arrow"))
    limit = largest - 1
    code, _, err = ended(
        train(
            "alone", tmp_path, *overrides, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
    )
    assert code == 2
    assert re.search(r"^mavis: .*File too large.* Hint: what is finished is kept", err, flags=re.MULTILINE), err
    assert "Traceback" not in err
    assert_whole(tmp_path / "run")
    assert_goes_on(train, "alone", tmp_path, overrides, unbroken)


class FullDisk:
    """Lets some calls of a function of `os` pass, and then says that the disk is full until room is made."""

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
def test_a_disk_that_is_full_at_any_write_leaves_whole_files_and_room_is_all_that_is_needed(
    run: Any, tmp_path: Path, room: pytest.MonkeyPatch, call: str
) -> None:
    expected = run(tmp_path / "unbroken")
    real = getattr(os, call)
    for attempts in range(100):
        disk = FullDisk(real, passing=6 * min(attempts, 1))  # room for a little more each time
        room.setattr(os, call, disk)
        try:
            critic = run(tmp_path / "run")
            break
        except OSError:
            assert disk.refused > 0
        finally:
            room.setattr(os, call, real)
        assert_whole(tmp_path / "run")
        assert not list((tmp_path / "run").rglob(".*"))  # nothing half written is left lying about
    assert attempts > 3
    for key, value in expected.state_dict().items():
        assert torch.equal(critic.state_dict()[key], value), key
    assert critic.calibration == expected.calibration
