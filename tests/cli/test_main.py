"""`mavis` itself: its help, its commands, and prompts that reach the command as they were written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mavis.cli import COMMANDS, main
from mavis.cli.overrides import exclude_shared_overrides, quote_text
from mavis.version import __version__


def test_help_lists_every_command_with_what_it_does(mavis: Any) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        ran = mavis(*arguments)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("usage: mavis <command>")
        for command, what in COMMANDS.items():
            assert any(line.split(maxsplit=1) == [command, what] for line in ran.out.splitlines())


def test_a_missing_command_prints_the_help_and_is_an_error(mavis: Any) -> None:
    ran = mavis()
    assert ran.code == 2
    assert ran.out == mavis("--help").out


def test_the_version_is_printed(mavis: Any) -> None:
    assert mavis("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(("command", "hint"), [("trian", "did you mean 'train'?"), ("xyz", "known: demo, train")])
def test_an_unknown_command_is_an_error_that_knows_the_right_ones(mavis: Any, command: str, hint: str) -> None:
    ran = mavis(command)
    assert ran.code == 2
    assert ran.err.startswith(f"mavis: there is no command {command!r}. Hint: {hint}")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_readable(mavis: Any, command: str) -> None:
    ran = mavis(command, "--help")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert ran.out.strip()
    assert "$" not in ran.out.replace("${", "")  # no part of the template is left unfilled
    assert max(map(len, lines)) <= 120
    assert "Powered by Hydra" not in ran.out
    assert lines[0].startswith(f"mavis {command}: ")
    assert f"  mavis {command}" in ran.out
    assert "Groups to choose from" in ran.out
    assert "Settings and their defaults" in ran.out


def parsed(override: str) -> Any:
    """What Hydra and OmegaConf make of an override."""
    element = OverridesParser.create().parse_override(override)
    config = OmegaConf.create({"prompt": None, "story": None})
    OmegaConf.update(config, element.key_or_group, element.value(), merge=True)
    return config[element.key_or_group]


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
        st.text(st.sampled_from("\\'\"${},=[]()# \t\n:ab?!*~+@%|/-.0"), min_size=1),
    )
)
@example('Tom said, "Hi" = {x} [1] it\'s\\')
@example("\\")
@example("\\\n")
@example("a\\'b\\\\'")
@example("mid\\dle and end\\\\")
@example("costs ${x} \\${y} \\\\${z")
@example("true")
@example("1e3")
def test_a_prompt_is_parsed_back_to_exactly_what_was_written(text: str) -> None:
    if text in ("null", "???"):  # nothing, and what Hydra holds for missing
        return
    assert parsed(quote_text(f"prompt={text}")) == text
    assert parsed(quote_text(f"story={text}")) == text


@pytest.mark.parametrize("override", ["prompt=", "prompt=null", "weights={a: 1}", "beta=2,4", "-m", "prompt_file=-"])
def test_other_overrides_are_not_quoted(override: str) -> None:
    assert quote_text(override) == override


def test_runs_of_a_sweep_are_named_by_what_differs() -> None:
    given = ["-m", "policy=pretrained", "policy.path='a/b'", "beta=2,4", "critic.hidden=choice(8,16)", "output=x"]
    *kept, added = exclude_shared_overrides(given)
    assert kept == given
    assert added.startswith("hydra.job.config.override_dirname.exclude_keys=")
    excluded = OverridesParser.create().parse_override(added).value()
    assert {"policy", "policy.path", "output", "threads"} <= set(map(str, excluded))
    assert not {"beta", "critic.hidden"} & set(map(str, excluded))


def test_a_sweep_in_which_everything_differs_is_named_by_everything() -> None:
    *_, added = exclude_shared_overrides(["-m", "beta=2,4"])
    assert OverridesParser.create().parse_override(added).value() == ["output", "threads"]


@pytest.mark.parametrize("given", [["beta=2,4"], ["-m", "beta=[2,"]])
def test_a_single_run_and_broken_grammar_are_left_alone(given: list[str]) -> None:
    assert exclude_shared_overrides(given) == given


def test_an_objective_weighted_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "prompt=Hi", "weights={positive: 1.0, 'positive': 0.5}"]) == 2
    assert "weights names objective 'positive' twice. Hint: give each objective one weight." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "bta=2"], "there is no setting 'bta'. Hint: did you mean 'beta'?"),
        (["train", "critic.hiden=8"], "there is no setting 'critic.hiden'. Hint: did you mean 'critic.hidden'?"),
        (["train", "objctive=[brevity]"], "there is no setting 'objctive'. Hint: did you mean 'objective'?"),
        (["train", "policy=embeded"], "policy has no option 'embeded'. Hint: did you mean 'embedded'?"),
        (
            ["train", "objective=brevity,positive"],
            "objective is given several values. Hint: write objective=[brevity,positive] to use all of them",
        ),
        (["train", "beta=[2,"], "'beta=[2,' cannot be parsed: "),
    ],
)
def test_an_invalid_override_is_reported_in_one_line(mavis: Any, arguments: list[str], said: str) -> None:
    ran = mavis(*arguments)
    assert ran.code == 2
    assert ran.err.startswith(f"mavis: {said}")
    assert " Hint: " in ran.err
    assert ran.err.count("\n") == 1


def test_an_interruption_is_reported_in_one_line(mavis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mavis.cli.hydra_app.prepare_process", interrupted)
    ran = mavis("train")
    assert ran.code == 130
    assert ran.err == "\nmavis: interrupted. Hint: finished work is kept; rerun the command to resume.\n"


@pytest.mark.parametrize("module", ["torch", "hydra", "transformers"])
def test_an_interruption_while_packages_are_imported_prints_no_traceback(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    command = [sys.executable, "-m", "mavis.cli", "train", f"output={tmp_path / 'run'}"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 130, ran.stderr
    assert ran.stderr.startswith("\nmavis: interrupted.")
    assert ran.stderr.count("\n") == 2
