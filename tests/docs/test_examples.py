"""Every example runs, in a small form."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.docs.notebook import code_cells, run_cells, stored_output
from tests.docs.pages import DOCS, ROOT

EXAMPLES = ROOT / "examples"
SMALL = {
    "steer.py": "--max-new-tokens 40 --responses 2",
    "train_your_own.py": "--rollouts 128 --iterations 1 --max-new-tokens 16 --output outputs/animals",
    "compare_policies.py": "--samples 4 --reference-samples 64 --kl 0.05 --max-new-tokens 8 --output outputs/all",
}


def run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](SMALL[name].split())


def test_every_example_is_tested_and_described() -> None:
    found = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert found == {*SMALL, "walkthrough.ipynb"}
    described = (DOCS / "guides" / "examples.md").read_text(encoding="utf-8")
    assert all(f"`examples/{name}`" in described for name in found)


def test_steering_shows_both_weights_and_their_kl(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("steer.py")
    printed = capsys.readouterr().out
    assert printed.count("{'positive': 1.0}, ") == printed.count("{'dialogue': 1.0}, ") == 2
    assert printed.count(" nats:\n  Once upon a time") == 4


def test_training_for_a_function_leaves_a_critic(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train_your_own.py")
    assert "iteration 0: rewards " in capsys.readouterr().out
    assert (workspace / "outputs" / "animals" / "critic" / "model.safetensors").is_file()


def test_comparison_tells_the_efficiency_of_each_choice_of_weights(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("compare_policies.py")
    printed = capsys.readouterr().out
    assert printed.count("tilted at KL 0.05: reward ") == 3
    assert printed.count("best of 16 ") == 3
    assert "mean efficiency " in printed


def test_notebook_runs_and_stores_what_its_cells_print(workspace: Path) -> None:
    notebook = json.loads((EXAMPLES / "walkthrough.ipynb").read_text(encoding="utf-8"))
    for cell, printed in run_cells(notebook):
        stored = stored_output(cell).splitlines()
        assert len(printed.splitlines()) == len(stored) > 0
        if "efficiency" not in "".join(cell["source"]):  # which rests on thousands of samples
            assert printed.splitlines()[0] == stored[0]
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, 7))
