"""Every command and snippet of the README runs, on a demo that is the real one but shorter."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEWER = {
    "train": "improvement.iterations=2 improvement.rollouts=1024 improvement.shard_size=512 improvement.fit.epochs=4 "
    "improvement.calibration_samples=8 decoding.max_new_tokens=32",
    "evaluate": "evaluation.divisions=1 evaluation.betas=[1.0,3.0] evaluation.samples=4 "
    "evaluation.reference_samples=32 evaluation.speed_repeats=1 evaluation.speed_batch=2 decoding.max_new_tokens=32",
    "generate": "decoding.max_new_tokens=16",
    "elicit": "decoding.max_new_tokens=16 prompts=2",
    "align": "alignment.steps=2 alignment.max_new_tokens=16 alignment.reference_samples=64 "
    "alignment.evaluation_samples=16",
}
FEWER["demo"] = f"{FEWER['train']} {FEWER['evaluate']}".replace(" decoding.max_new_tokens=32", "", 1)
# A search needs a limit that can be trusted, and so enough rollouts for a KL that is small enough.
FEWER["search"] = FEWER["demo"].replace("samples=32", "samples=256") + " evaluation.target_kls=[0.2]"
SWEEP = "improvement.rollouts=64 improvement.fit.epochs=1 improvement.iterations=1 improvement.calibration_samples=2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def mavis(command: str, where: Path) -> str:
    words = shlex.split(command, comments=True)
    assert words[0] == "mavis"
    few = "-m" in words or words[1] == "search" or "critic=value_model" in words or "improvement=independent" in words
    extra = f"{FEWER.get(words[1], '')} {SWEEP if few else ''} threads=1".split() if words[1] != "report" else []
    # The later of two equal settings would be an error, so what the README gives is kept.
    given = {word.partition("=")[0] for word in words}
    extra = list({word.partition("=")[0]: word for word in extra if word.partition("=")[0] not in given}.values())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mavis.cli", *words[1:], *extra],
        cwd=where,
        env=environment,
        input="1\n2\n0\n1\n1\n2\n",  # answers to what `mavis elicit` asks
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which a short demo ran, and what it printed."""
    where = tmp_path_factory.mktemp("readme")
    return where, mavis("mavis demo", where)


def test_the_demo_leaves_what_the_readme_says_and_names_a_command_that_works(demo: tuple[Path, str]) -> None:
    where, printed = demo
    for name in (
        "critic/config.json",
        "critic/model.safetensors",
        "report.json",
        "report.csv",
        "front.png",
        "frontier.png",
    ):
        assert (where / "outputs" / "demo" / name).is_file(), name
    assert printed.count("Once upon a time") >= 3
    next_command = re.search(r"^  (mavis generate .*)$", printed, flags=re.MULTILINE)
    assert next_command is not None, printed
    assert "Once upon a time" in mavis(next_command[1], where)


def test_every_python_snippet_runs_in_order(demo: tuple[Path, str]) -> None:
    where, _ = demo
    script = "\n".join(blocks("python")).replace("max_new_tokens=64", "max_new_tokens=16")
    assert script.count("mavis.generate(") == 2
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_mavis_command_runs_in_order(demo: tuple[Path, str]) -> None:
    where, _ = demo
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("mavis ")]
    used = {"train", "search", "report", "align", "evaluate", "generate", "elicit"}
    assert {shlex.split(command)[1] for command in commands} == used
    for command in commands:
        mavis(command, where)
    assert len(list((where / "outputs" / "sweep").glob("*/critic/config.json"))) == 4
    assert {path.name for path in (where / "outputs" / "sweep").glob("runs.*")} == {"runs.csv", "runs.md", "runs.png"}
    assert len(list((where / "outputs" / "search").glob("trial-*/critic/config.json"))) == 3


def test_the_command_for_many_processes_runs(demo: tuple[Path, str]) -> None:
    where, _ = demo
    (command,) = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("accelerate ")]
    launch, module, *given = re.split(r" -m (\S+)", command, maxsplit=1)
    assert module == "mavis.cli.train"
    words = [*shlex.split(launch)[1:], "--main_process_port", "0", "-m", module, *shlex.split(given[0])]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            *words,
            *f"decoding.max_new_tokens=16 improvement.shard_size=32 {SWEEP}".split(),
        ],
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("critic: ") == 1
    assert (where / "outputs" / "together" / "critic" / "config.json").is_file()


def test_every_make_target_exists_and_ci_calls_the_test_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        shlex.split(line)[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")
    }
    assert targets == {"demo", "test", "test-vllm", "serve"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert run[-2:] == ["make test", "make test-vllm"]


def test_every_path_it_names_exists() -> None:
    named = set(re.findall(r"^    ((?:mavis|hydra_plugins|conf|benchmarks|tests)/\S*)", README, flags=re.MULTILINE))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]


def test_its_figures_are_those_of_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "figures.py"), "--check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
