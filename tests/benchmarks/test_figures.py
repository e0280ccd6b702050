"""The benchmark pages and the README's table are what the result files say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from mavis.utils.markdown import markdown_table


@pytest.fixture
def figures(benchmarks_on_path: None) -> Any:
    return importlib.import_module("figures")


def test_committed_pages_and_readme_match_the_result_files(figures: Any) -> None:
    for path, text in figures.generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python benchmarks/figures.py"


def test_every_result_file_has_a_page(figures: Any) -> None:
    pages = "".join(text for path, text in figures.generated().items() if path != figures.README)
    names = {path.stem for path in (Path(figures.__file__).parent / "results").glob("*.json")}
    shown = set(re.findall(r"`benchmarks/results/([\w-]+)\.json`", pages))
    assert shown == names - {"policy"}  # which is on the policy's own card


def test_links_and_plots_of_the_pages_exist(figures: Any) -> None:
    pages = sorted(figures.PAGES_FOLDER.glob("*.md"))
    assert {page.stem for page in pages} == {*figures.PAGES, "index"}
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_plots_are_drawn_alike_every_time(figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setattr(figures, "PAGES_FOLDER", folder)
        figures.draw_plots()
        drawn.append({path.name: path.read_bytes() for path in folder.glob("*.svg")})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"frontier.svg", "vectors.svg"}


def test_the_readme_table_is_small(figures: Any) -> None:
    table = [line for line in figures.frontier.readme_table().splitlines() if line.startswith("|")]
    assert 3 <= len(table) - len(markdown_table(["x"], []).splitlines()) <= 10


def test_check_reports_outdated_pages(
    figures: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["figures.py", "--check"])
    assert figures.main() == 0
    monkeypatch.setitem(figures.PAGES, "demo", lambda: "something else")
    assert figures.main() == 1
    assert "outdated: docs/benchmarks/demo.md" in capsys.readouterr().err
