"""Every command and snippet of the README and of the documentation runs, on small settings."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks, name_of

SMALL_TRAINING = (
    "improvement.iterations=1",
    "improvement.rollouts=32",
    "improvement.shard_size=32",
    "improvement.fit.epochs=1",
    "improvement.calibration_samples=2",
    "decoding.max_new_tokens=8",
)
SMALL_EVALUATION = (
    "evaluation.divisions=1",
    "evaluation.betas=[1.0,3.0]",
    "evaluation.samples=4",
    "evaluation.reference_samples=32",
    "evaluation.speed_repeats=0",
    "decoding.max_new_tokens=8",
)
SMALL = {
    "train": SMALL_TRAINING,
    "evaluate": SMALL_EVALUATION,
    # An efficiency needs a limit that can be trusted, so enough rollouts and a KL that is small enough.
    "search": (
        *SMALL_TRAINING,
        *SMALL_EVALUATION,
        "evaluation.reference_samples=256",
        "evaluation.target_kls=[0.001]",
    ),
    "distill": ("distillation.rollouts=32", "distillation.fit.epochs=1", "decoding.max_new_tokens=8"),
    "generate": ("decoding.max_new_tokens=32",),
    "chat": ("decoding.max_new_tokens=8",),
    "info": (),
    "elicit": ("decoding.max_new_tokens=8", "prompts=2"),
    "align": (
        "alignment.steps=2",
        "alignment.max_new_tokens=8",
        "alignment.reference_samples=32",
        "alignment.evaluation_samples=16",
    ),
    "train-reward": (),
    "report": (),
}
"""What makes a command small enough for a test."""

NOT_RUN = {"pip", "make", "source"}
"""Commands that set up an environment or run other commands; see test_pages.py."""


def overrides(arguments: list[str]) -> list[str]:
    """Add the small settings to the arguments of a command, except where the page gives them itself."""
    command, given = arguments[0], {word.partition("=")[0] for word in arguments}
    small = SMALL[command] + (() if command in ("info", "report") else ("threads=1",))
    last = {word.partition("=")[0]: word for word in small}  # an override may be given once only
    return [*arguments, *(word for name, word in last.items() if name not in given)]


SLOW = ("docs/guides/sweeps.md", "docs/guides/processes.md")
"""Pages whose commands start processes of their own."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW else (), id=name_of(page))
        for page in PAGES
        if blocks(page)
    ],
)
def test_page_runs_in_order_and_prints_what_it_says(
    page: Path, workspace: Path, run_mavis: Callable[[list[str]], str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            printed = run_python(block, page, namespace)
        elif block.language == "sh":
            for command in block.commands():
                if command[0] == "mavis":
                    run_mavis(overrides(command[1:]))
                elif command[0] == "accelerate":
                    launch(command[1:], workspace)
                else:
                    assert command[0] in NOT_RUN, command
        elif block.language == "text" and printed:
            assert printed.rstrip() == block.code.rstrip()
        if block.language != "python":
            printed = ""
    check_outputs(name_of(page), workspace)


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    """Run a block in the namespace of its page and return what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(block.code, str(page), "exec"), namespace)
    return printed.getvalue()


def launch(arguments: list[str], folder: Path) -> None:
    """Run `accelerate launch` with the small settings."""
    assert arguments[-3:-1] == ["-m", "mavis.cli.train"], arguments
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli"),
            *(arguments[0], "--main_process_port", "0", *arguments[1:]),
            *SMALL_TRAINING,
            "improvement.shard_size=16",
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("critic: ") == 1


def check_outputs(page: str, folder: Path) -> None:
    """See that a page's commands left what they are for."""
    expected = {
        "README.md": ["outputs/mine/critic/config.json", "outputs/brief/critic/config.json"],
        "docs/guides/train.md": ["outputs/mine-report/report.json", "outputs/python/critic/config.json"],
        "docs/guides/processes.md": ["outputs/two-processes/critic/config.json"],
        "docs/guides/sweeps.md": ["outputs/sweep/runs.csv", "outputs/sweep/runs.md", "outputs/sweep/runs.png"],
        "docs/guides/distill.md": ["outputs/one/critic/config.json"],
        "docs/guides/reward_models.md": [
            "outputs/cheerful/model/model.safetensors",
            "outputs/cheerful/reliability.png",
            "outputs/steered/critic/config.json",
        ],
        "docs/guides/vectors.md": ["outputs/happier/config.json", "outputs/aligned/report.json"],
    }
    for name in expected.get(page, []):
        assert (folder / name).is_file(), name
    if page == "docs/guides/sweeps.md":
        assert len(list((folder / "outputs" / "sweep").glob("*/critic/config.json"))) == 4
        assert len(list((folder / "outputs" / "search").glob("trial-*/critic/config.json"))) == 3


def test_every_command_but_the_demo_is_shown_somewhere() -> None:
    from mavis.cli import COMMANDS

    commands = [command for page in PAGES for block in blocks(page) for command in shell(block)]
    assert {command[1] for command in commands if command[0] == "mavis"} == set(COMMANDS) - {"demo"}
    assert {"demo", "test", "docs", "serve", "test-vllm"} == {
        command[1] for command in commands if command[0] == "make"
    }


def shell(block: Block) -> list[list[str]]:
    """The commands of a block, if it is one for the shell."""
    return block.commands() if block.language == "sh" else []


def test_snippets_that_are_not_run_are_few_and_compile() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language == "py"]
    assert len(found) <= 6
    for block in found:
        compile(block.code, "<py>", "exec")
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"console", "python", "py", "sh", "text", "yaml"}  # console is a dialogue


def test_quickstart_of_the_readme_shows_what_it_prints() -> None:
    readme = blocks(ROOT / "README.md")
    shown = next(index for index, block in enumerate(readme) if block.language == "python")
    assert "mavis.generate(" in readme[shown].code
    assert readme[shown + 1].language == "text"
    assert len(re.findall(r"^\{'\w+': 1\.0\}$", readme[shown + 1].code, flags=re.MULTILINE)) == 2
