"""A folder in which pages and examples run, and the command line within the test's own process."""

from __future__ import annotations

import io
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from mavis.cli import main
from mavis.policies import embedded
from tests.docs.pages import ROOT
from tests.processes import restored_process

ANSWERS = "1\n2\n0\n1\n1\n2\n"
"""What the user types when `mavis elicit` asks."""


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """The working folder, with what the pages assume: the demo's critic, a model and prompts of one's own."""
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    shutil.copytree(embedded.critic_path(), tmp_path / "outputs" / "demo" / "critic")
    (tmp_path / "my-model").symlink_to(embedded.path())
    shutil.copytree(embedded.path(), tmp_path / "my-chat-model", ignore=shutil.ignore_patterns("critic", "*.py"))
    template = ROOT / "tests" / "policies" / "chat_templates" / "zephyr.jinja"
    shutil.copy(template, tmp_path / "my-chat-model" / "chat_template.jinja")
    (tmp_path / "questions.txt").write_text("Who are you?\nWhere is the cat?\nWhy?\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("The cat\nA dog\nOnce there was\n", encoding="utf-8")
    with restored_process(tmp_path):
        yield tmp_path


@pytest.fixture
def run_mavis(workspace: Path) -> Callable[[list[str]], str]:
    """A function that runs `mavis` with arguments in the workspace and returns what it prints."""

    def run(arguments: list[str]) -> str:
        out, err = io.StringIO(), io.StringIO()
        with restored_process(workspace), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a user sees them, and the command goes on
            sys.stdin = io.StringIO(ANSWERS)
            try:
                code = main(arguments)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        assert code == 0, f"mavis {' '.join(arguments)}\n{out.getvalue()}{err.getvalue()}"
        return out.getvalue()

    return run
