"""Every public class and function shows an example with its output, and the example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import logging
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

ROOMS = (
    "mavis",
    "mavis.policies",
    "mavis.critics",
    "mavis.decoding",
    "mavis.vectors",
    "mavis.rollouts",
    "mavis.rewards",
    "mavis.math",
    "mavis.training",
    "mavis.evaluation",
    "mavis.preference",
    "mavis.exact",
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def exported() -> Iterator[tuple[str, Any]]:
    """Yield every exported class and function once, by the name under which it is first exported."""
    seen: set[int] = set()
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in seen:
                seen.add(id(value))
                yield f"{room}.{name}", value


EXPORTED = dict(exported())


@pytest.mark.parametrize("room", ROOMS)
def test_room_exports_names_that_exist_once_each(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", EXPORTED)
def test_example_runs_and_prints_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docstring = inspect.getdoc(EXPORTED[name])
    assert docstring, f"{name} has no docstring"
    section = docstring.partition("Examples:\n")[2]
    assert ">>> " in section, f"the docstring of {name} has no `Examples:` section with >>> lines"
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(docstring, {"__name__": "__main__"}, name, name, 0)
    assert any(example.want for example in test.examples), f"the example of {name} prints nothing"
    said = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    threads = torch.get_num_threads()
    logging.disable(logging.WARNING)  # of libraries that log to standard output when they are first imported
    with torch.random.fork_rng(devices=[]), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        runner.run(test, out=said.write)
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)
    assert runner.failures == 0, said.getvalue()
    assert Path(os.getcwd()) == tmp_path, f"the example of {name} leaves the working folder"
