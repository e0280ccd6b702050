"""`mavis demo`, shortened: it leaves what the README says and names a command that works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

SHORT = (
    *("improvement.iterations=1", "improvement.rollouts=256", "improvement.shard_size=256"),
    *("improvement.fit.epochs=2", "improvement.calibration_samples=4", "decoding.max_new_tokens=16"),
    *("evaluation.divisions=1", "evaluation.betas=[1.0,3.0]", "evaluation.samples=4"),
    *("evaluation.reference_samples=32", "evaluation.speed_repeats=1", "evaluation.speed_batch=2"),
)
LEFT = ("critic/config.json", "critic/model.safetensors", "report.json", "report.csv", "front.png", "frontier.png")


@pytest.mark.slow
def test_demo_leaves_what_the_readme_says_and_names_a_command_that_works(
    tmp_path: Path, workspace: Path, run_mavis: Callable[[list[str]], str]
) -> None:
    done = subprocess.run(  # in a process of its own, because it starts another one
        [sys.executable, "-m", "mavis.cli", "demo", *SHORT],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in LEFT:
        assert (workspace / "outputs" / "demo" / name).is_file(), name
        assert Path(name).parts[0] in readme
    assert done.stdout.count("Once upon a time") >= 3
    following = re.search(r"^  (mavis generate .*)$", done.stdout, flags=re.MULTILINE)
    assert following is not None, done.stdout
    assert "Once upon a time" in run_mavis([*shlex.split(following[1])[1:], "decoding.max_new_tokens=16"])
