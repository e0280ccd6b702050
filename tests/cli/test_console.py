"""What commands print: terminals are safe from it, and files get it as it is."""

from __future__ import annotations

import sys

import pytest

from mavis.cli.console import print_line, print_table, terminal_text

HOSTILE = "a\x1b[2J\x9b31m\x07\r\x00\u202eb"


def test_terminals_get_escapes_and_files_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert terminal_text(HOSTILE) == HOSTILE
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_line(HOSTILE)
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b31m\\x07\\r\\x00\\u202eb\n"
    assert terminal_text("größe\n\t名 😀") == "größe\n\t名 😀"


@pytest.mark.parametrize("name", ["a[/b]", "[red]x", "[link=x]y"])
def test_names_are_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(name, [{name: name}])
    assert capsys.readouterr().out.count(name) == 3
