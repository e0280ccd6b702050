"""The pages are complete: links, extras, make targets, and a reference for every public name."""

from __future__ import annotations

import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mavis
from tests.docs.pages import DOCS, PAGES, ROOT, blocks, name_of

INTERNAL = {"mavis.cli", "mavis.utils"}
"""Packages whose names are no part of the Python API."""

README = (ROOT / "README.md").read_text(encoding="utf-8")


def navigation(entries: list[object]) -> list[str]:
    """List the pages of the navigation."""
    found: list[str] = []
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            found += navigation(target) if isinstance(target, list) else [str(target)]
    return found


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, in which tags may name Python objects."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.fixture(scope="module")
def site() -> list[str]:
    """The pages in the navigation of the site."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)
    return navigation(config["nav"])


def test_readme_is_short_and_the_paths_it_names_exist() -> None:
    assert len(README.splitlines()) <= 150
    named = set(re.findall(r"^    ((?:mavis|conf|benchmarks|recipes|tests)/\S*)", README, flags=re.MULTILINE))
    named |= {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert len(named) > 15
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_extras_are_installed_as_they_are_called(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    targets = re.findall(r"pip install (?:-e )?('[^']+'|\S+)", text)
    for target in (target.strip("'`") for target in targets):
        name, _, extras = target.rstrip("]").partition("[")
        assert name in (".", project["name"], "vllm", "mavis_decoding-*.whl"), target
        assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"]), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [
        command
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for command in block.commands()
        if command[0] == "make"
    ]
    assert len(commands) >= 5
    assert all(re.search(rf"^{command[1]}:", makefile, flags=re.MULTILINE) for command in commands)


def test_settings_that_pages_name_exist() -> None:
    files = [path for path in (ROOT / "conf").rglob("*.yaml") if "hydra" not in path.parts]
    known = {setting for path in files for setting in settings(path)}
    groups = "|".join(
        sorted({setting.partition(".")[0] for setting in known if "." in setting} - {"hydra", "objectives"})
    )
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(rf"(?<![\w./+])((?:{groups})\.[a-z_.]+[a-z_])(?==|`)", text)
        missing += [(name_of(page), name) for name in named if name not in known]
    assert not missing


def settings(path: Path) -> set[str]:
    """List the dotted names of a YAML file's settings, as they are in the composed configuration."""
    text = path.read_text(encoding="utf-8")
    directive = re.search(r"^# @package (\S+)", text, flags=re.MULTILINE)
    package = directive[1] if directive else path.parent.name if path.parent.name != "conf" else "_global_"
    found: set[str] = set()

    def walk(value: object, name: str) -> None:
        found.add(name)
        for key, inner in value.items() if isinstance(value, dict) else ():
            walk(inner, f"{name}.{key}" if name else str(key))

    walk(yaml.safe_load(text) or {}, "" if package == "_global_" else package)
    return found


def test_every_page_is_in_the_navigation(site: list[str]) -> None:
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    generated = {"reference/cli.md", "reference/configuration.md", "contributing.md", "changelog.md"}
    assert set(site) == written | generated
    assert len(site) == len(set(site))


def test_every_package_with_public_names_has_a_reference_page() -> None:
    rooms = [
        module.name
        for module in pkgutil.iter_modules(mavis.__path__, "mavis.")
        if module.ispkg
        and module.name not in INTERNAL
        and getattr(importlib.import_module(module.name), "__all__", None)
    ]
    assert len(rooms) >= 10
    missing = [
        room
        for room in rooms
        if f"::: {room}\n" not in (DOCS / "reference" / f"{room.removeprefix('mavis.')}.md").read_text(encoding="utf-8")
    ]
    assert not missing


def test_the_overview_names_everything_that_mavis_exports() -> None:
    overview = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`mavis\.(\w+)`", overview)) >= set(mavis.__all__) - {"__version__"}


def test_the_site_loads_nothing_from_the_network() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "repo_url"} & set(config)  # a repository's page is asked for its stars
    assert config["strict"] is True
