"""Sweeps: parallel runs, runs that fail alone, jobs of a cluster, and the report of all runs."""

from __future__ import annotations

import csv
import json
import os
import stat
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mavis.critics import Critic

ROOT = Path(__file__).resolve().parents[2]

MEETING = '''
"""An objective that a run can only score when another run is at work at the same time."""
import os
import time
from importlib import import_module
from pathlib import Path

class Meet:
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, prompts, responses):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / str(os.getpid())).touch()
        until = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < 2:
            if time.monotonic() > until:
                raise RuntimeError("no other run came")
            time.sleep(0.05)
        return [float(len(response)) for response in responses]
'''


def in_a_process(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mavis` as users do; the launchers' own processes take their environment from it."""
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "-m", "mavis.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,  # a job that never ends is a failure, and no test that hangs
    )


@pytest.fixture
def tiny(tiny_folder: Path, small: tuple[str, ...]) -> list[str]:
    """Overrides of a small training of the tiny policy."""
    others = [one for one in small if one != "policy=tiny" and not one.startswith("objective")]
    return ["policy=pretrained", f"policy.path={tiny_folder}", "objective=[brevity]", *others]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_two_runs_of_a_sweep_run_at_the_same_time(tiny: list[str], tmp_path: Path, launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    (tmp_path / "meeting.py").write_text(MEETING)
    meet = ["+objectives.meet._target_=meeting.Meet", f"+objectives.meet.folder={tmp_path / 'met'}"]
    together = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    ran = in_a_process(
        ["train", "-m", *tiny, *meet, f"launcher={launcher}", *together, "beta=2,4", "output=sweep"], tmp_path
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert len(list((tmp_path / "met").iterdir())) == 2
    for beta in (2, 4):
        run = tmp_path / "sweep" / f"beta={beta}"
        assert Critic.from_pretrained(run / "critic").objectives == ("brevity", "meet")
        assert json.loads((run / "run.json").read_text())["settings"]["beta"] == beta


def test_a_run_that_fails_fails_alone_and_is_reported(mavis: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    ran = mavis("train", "-m", *small, "beta=-1,2,4", "output=sweep")
    assert ran.code == 1
    assert "mavis: beta is -1, expected a finite number > 0" in ran.err
    assert "Traceback" not in ran.err
    for beta in (2, 4):
        assert (tmp_path / "sweep" / f"beta={beta}" / "critic" / "config.json").is_file()
    error = json.loads((tmp_path / "sweep" / "beta=-1" / "error.json").read_text())["error"]
    assert error.startswith("beta is -1")

    reported = mavis("report", "sweep")
    assert reported.code == 0, reported.err
    assert "3 runs: 1 failed, 2 finished" in reported.out
    assert f"beta=-1: {error}" in reported.out
    with (tmp_path / "sweep" / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["beta"]: row["state"] for row in rows} == {"-1": "failed", "2": "finished", "4": "finished"}
    report = json.loads((tmp_path / "sweep" / "beta=2" / "iteration-0" / "report.json").read_text())
    (row,) = (row for row in rows if row["beta"] == "2")
    assert float(row["reward positive"]) == report["rewards"]["positive"]
    assert row["iterations"] == "1/1"
    assert (tmp_path / "sweep" / "runs.png").is_file()
    assert (tmp_path / "sweep" / "runs.md").read_text().count("\n| ") == 4

    # A folder whose name is full of grammar, as those of runs are, and another format.
    reported = mavis("report", "sweep/beta=2", "format=svg", "output=plots")
    assert reported.code == 0, reported.err
    assert (tmp_path / "plots" / "runs.svg").is_file()


def test_a_run_that_succeeds_when_rerun_is_no_longer_reported_as_failed(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:

        def wrong(*arguments: Any, **named: Any) -> None:
            raise LookupError("a mistake in the code")

        broken.setattr(import_module("mavis.training.improvement.stages"), "fit", wrong)
        ran = mavis("train", "-m", *small, "beta=2,4", "output=sweep")
        assert ran.code == 1
        assert "mavis: LookupError: a mistake in the code" in ran.err
        # The run's own log holds the traceback.
        assert "Traceback" in (tmp_path / "sweep" / "beta=2" / "train.log").read_text()
    assert "2 failed" in mavis("report", "sweep").out
    assert mavis("train", *small, "beta=2", "output='sweep/beta=2'").code == 0  # one by itself
    assert "1 finished, 1 failed" in mavis("report", "sweep").out
    assert mavis("train", "-m", *small, "beta=2,4", "output=sweep").code == 0
    assert "2 finished" in mavis("report", "sweep").out


def test_interrupting_a_sweep_ends_all_of_it(
    mavis: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("mavis.training.improvement.stages"), "fit", interrupted)
    ran = mavis("train", "-m", *small, "beta=2,4", "output=sweep")
    assert ran.code == 130
    assert ran.err.endswith("mavis: interrupted. Hint: finished work is kept; rerun the command to resume.\n")
    assert not (tmp_path / "sweep" / "beta=4").exists()
    reported = mavis("report", "sweep")
    assert "1 unfinished, 1 not started" in reported.out
    assert "0/1" in reported.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-m", "bta=2,3"], "there is no setting 'bta'. Hint: did you mean 'beta'?"),
        (["train", "-m", "critic=hidden_state,value_modl"], "Could not find 'critic/value_modl'"),
        (["train", "experiment=papr"], "experiment has no option 'papr'. Hint: did you mean 'paper'?"),
        (["train", "-m", "launcher=jobli"], "launcher has no option 'jobli'. Hint: did you mean 'joblib'?"),
        (["search", "bta=interval(1,2)"], "there is no setting 'bta'. Hint: did you mean 'beta'?"),
        (["report"], "folder is not given. Hint: write folder=..."),
        (["report", "nowhere"], "folder is 'nowhere', which does not exist"),
        (["report", "."], "folder is '.', which holds no run"),
        (["report", ".", "format=gif"], "folder is '.', which holds no run"),
    ],
)
def test_a_mistake_is_reported_in_one_line(mavis: Any, arguments: list[str], message: str) -> None:
    ran = mavis(*arguments)
    assert ran.code != 0
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_a_launcher_that_is_not_installed_is_named(mavis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    assert mavis("train", "launcher=joblib", "--cfg", "job").code == 0  # once found, it is in the store
    monkeypatch.delitem(store.repo["hydra"]["launcher"], "joblib.yaml")
    ran = mavis("train", "-m", "launcher=joblib", "beta=1,2")
    assert ran.code == 2
    assert ran.err == (
        "mavis: launcher needs hydra-joblib-launcher, which is not installed. "
        "Hint: pip install 'mavis-decoding[sweep]'.\n"
    )


SLURM = {
    "sbatch": """#!/usr/bin/env python3
# Runs every task of the array, one after another, with what SLURM tells its jobs.
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, flags=re.M))
first, last = re.match(r"(\\d+)-(\\d+)", options["array"]).groups()
open(os.environ["SEEN"], "a").write(script)
print("Submitted batch job 77", flush=True)
if os.fork() == 0:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    for task in range(int(first), int(last) + 1):
        variables = {"JOB_ID": 77, "ARRAY_JOB_ID": 77, "ARRAY_TASK_ID": task, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
        variables |= {"JOB_NUM_NODES": 1, "NNODES": 1, "NTASKS": 1, "JOB_NODELIST": "here", "RESTART_COUNT": 0}
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in variables.items()}
        subprocess.run(["bash", sys.argv[-1]], env=environment)
""",
    "srun": """#!/usr/bin/env python3
# Runs a command, with its output where it is wanted.
import os, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    if command[0] in ("--output", "--error"):
        path = command.pop(1).replace("%A", "77").replace("%a", os.environ["SLURM_ARRAY_TASK_ID"]).replace("%t", "0")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 + (command[0] == "--error"))
    del command[0]
os.execvp(command[0], command)
""",
    "sacct": """#!/usr/bin/env python3
print("JobID|State|NodeList")
for task in range(2):
    print(f"77_{task}|RUNNING|here")
""",
    "scontrol": "#!/bin/sh\necho here\n",
}


@pytest.mark.slow
def test_a_sweep_becomes_one_array_of_jobs_on_a_slurm_cluster(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, script in SLURM.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    ran = in_a_process(
        ["train", "-m", *tiny, "launcher=submitit", "hydra.launcher.partition=short", "beta=2,4", "output=sweep"],
        tmp_path,
        PATH=os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]),
        SEEN=str(tmp_path / "submitted.sh"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    submitted = (tmp_path / "submitted.sh").read_text()
    for option in ("array=0-1%2", "time=240", "cpus-per-task=4", "mem=16GB", "partition=short", "job-name=train"):
        assert f"#SBATCH --{option}\n" in submitted, submitted
    for beta in (2, 4):
        run = tmp_path / "sweep" / f"beta={beta}"
        assert Critic.from_pretrained(run / "critic").objectives == ("brevity",)
    reported = in_a_process(["report", "sweep"], tmp_path)
    assert "2 runs: 2 finished" in reported.stdout
