"""Mistakes on the command line: one line that names the setting, its value and what helps, before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mavis.cli.conf_dir import folder_name
from mavis.policies import embedded
from tests.cli.conftest import EVALUATION

ROOT = Path(__file__).parents[2]


def assert_refused(ran: Any, message: str, hint: str) -> None:
    assert ran.code == 2, ran.err
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("mavis: ")
    assert message in lines[0]
    assert f"Hint: {hint}" in lines[0]


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("objective=null", "'objective=null' chooses no option", "name an option of the group"),
        ("objectives=3", "objectives is 3, expected a mapping", "choose them by name"),
        (
            "objectives.readability.hardest=3",
            "no setting 'objectives.readability.hardest'",
            "choose it: objective=[...,",
        ),
        ("objectives.brevty.scale=3", "there is no setting 'objectives.brevty.scale'", "did you mean 'brevity'?"),
        ("critic.backbone=x", "there is no setting 'critic.backbone'", "critic=value_model has it."),
        ("column=x", "there is no setting 'column'", "known: "),
        ("beta=abc", "beta is 'abc', expected a finite number > 0", ""),
        ("beta=-1", "beta is -1, expected a finite number > 0", ""),
        ("seed=1.5", "seed is 1.5, expected a whole number ≥ 0", "0 is the default."),
        ("seed=-1", "seed is -1, expected a whole number ≥ 0", "0 is the default."),
        ("threads=0", "threads is 0, expected a whole number ≥ 1", "null takes torch's default."),
        ("decoding.max_new_tokens=5.5", "max_new_tokens is 5.5, expected a whole number ≥ 1", ""),
        ("policy.device=cuda:99", "policy.device is 'cuda:99', which torch cannot use", "use cpu"),
        ("policy.device=gpu", "policy.device is 'gpu', which torch cannot use", "use cpu"),
        ("policy.device=meta", "policy.device is 'meta', where there are no weights", "use cpu"),
        ("policy.dtype=fp16", "policy.dtype is 'fp16', which is not a floating dtype", "use auto, float32"),
        ("policy.dtype=int8", "policy.dtype is 'int8', which is not a floating dtype", "use auto, float32"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(
    mavis: Any, small: Any, override: str, message: str, hint: str
) -> None:
    name = override.partition("=")[0]
    others = [item for item in small if item.partition("=")[0] != name]
    assert_refused(mavis("train", *others, "output=out", override), message, hint)


def test_a_setting_of_an_option_that_was_not_chosen_names_the_option(mavis: Any) -> None:
    ran = mavis("generate", f"checkpoint={embedded.critic_path()}", "prompt=Once", "policy.device=cuda")
    assert_refused(ran, "there is no setting 'policy.device'", "policy=pretrained or policy=smollm2 has it.")


@pytest.mark.parametrize("output", ["taken", "taken/deeper/still"])
def test_an_output_that_is_a_file_is_refused(mavis: Any, small: Any, tmp_path: Path, output: str) -> None:
    (tmp_path / "taken").write_text("mine")
    ran = mavis("train", *small, f"output={tmp_path / output}")
    assert_refused(ran, f"output is '{tmp_path / output}', but '{tmp_path / 'taken'}' is a file", "name a folder.")


def test_an_output_that_cannot_be_written_is_refused(
    mavis: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    ran = mavis("train", *small, f"output={tmp_path / 'out'}")
    assert_refused(ran, f"but '{tmp_path}' cannot be written to", "name another folder.")


@pytest.mark.parametrize("removed", ["~evaluation.held_out", "~evaluation.betas", "~data"])
def test_a_removed_group_is_taken_as_empty_or_missed_by_name(mavis: Any, trained: Path, removed: str) -> None:
    given = [item for item in EVALUATION if item.partition("=")[0] != removed[1:]]
    objective = "objective=[positive,brevity]"
    ran = mavis("evaluate", "policy=tiny", objective, f"checkpoint={trained}", *given, removed)
    assert "Traceback" not in ran.err
    if removed == "~data":
        assert_refused(ran, "the setting data is missing, which this command reads", "do not remove it by ~.")
    else:  # the defaults hold
        assert ran.code == 0, ran.err


def test_a_long_name_of_a_run_is_cut_and_told_apart() -> None:
    first, second = ("data.prompts.source=[" + ",".join([f"prompt {i} é" for i in range(30)] + [end]) for end in "ab")
    names = {folder_name(first), folder_name(second)}
    assert len(names) == 2
    assert all(len(name.encode()) <= 200 for name in names)
    assert folder_name("beta=2") == "beta=2"


def test_a_sweep_over_long_lists_runs(mavis: Any, small: Any, tmp_path: Path) -> None:
    lists = ",".join("[" + ",".join(f"the dog {kind} {i}" for i in range(30)) + "]" for kind in "ab")
    ran = mavis("train", "-m", *small, "data=file", f"data.prompts.source={lists}", "output=sweep")
    assert ran.code == 0, ran.err
    assert len(list((tmp_path / "sweep").glob("*/critic"))) == 2


def test_a_warning_is_one_line_without_a_place_in_the_code(tmp_path: Path) -> None:
    arguments = ["generate", f"checkpoint={embedded.critic_path()}", "prompt=Once", "target_kl=2", "greedy=true"]
    ran = subprocess.run(
        [sys.executable, "-m", "mavis.cli", *arguments, "decoding.max_new_tokens=2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    [line] = ran.stderr.splitlines()
    assert line.startswith("mavis: warning: target_kl is 2, but 2 tokens are too few to spend it")
