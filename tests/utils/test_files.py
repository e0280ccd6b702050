"""Files and folders that are replaced whole or not at all, and manifests that keep runs apart."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mavis.errors import DataError
from mavis.utils.files import atomic_file, atomic_folder, describe_pickles, matches_manifest, read_json, write_json


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "a.txt").write_text(text)


def text_of(path: Path) -> str:
    return (path / "inside" / "a.txt" if path.is_dir() else path).read_text()


WRITERS = [write_file, write_folder]


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_written_replaces_what_was_there_and_leaves_nothing_beside_it(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    target = tmp_path / "deep" / "target"
    for text in ("first", "second"):
        write(target, text)
        assert text_of(target) == text
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
def test_an_exception_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path, context: Any) -> None:
    target = tmp_path / "target"
    (write_file if context is atomic_file else write_folder)(target, "first")
    with pytest.raises(RuntimeError, match="half way"), context(target) as temporary:
        (temporary if context is atomic_file else temporary / "b.txt").write_text("half")
        raise RuntimeError("half way")
    assert text_of(target) == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_moved_into_place_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    write_folder(target, "first")
    import os

    replace = os.replace

    def fails(source: Any, goal: Any) -> None:
        if Path(goal) == target and ".old." not in str(source):
            raise OSError("full")
        replace(source, goal)

    monkeypatch.setattr("mavis.utils.files.os.replace", fails)
    with pytest.raises(OSError, match="full"):
        write_folder(target, "second")
    assert text_of(target) == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "a")
    write_folder(tmp_path / "folder", "a")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"β": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "β" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_no_json_are_refused_before_anything_is_written(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": number})
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_manifest_matches_none(tmp_path: Path) -> None:
    assert not matches_manifest(tmp_path / "run.json", {"seed": 0}, "a run with different")
    assert not list(tmp_path.iterdir())


def test_a_manifest_matches_itself(tmp_path: Path) -> None:
    manifest = {"seed": 0, "settings": {"beta": 2.0, "names": ["a"]}}
    write_json(tmp_path / "run.json", manifest)
    assert matches_manifest(tmp_path / "run.json", manifest, "a run with different")


@pytest.mark.parametrize(
    ("manifest", "keys"),
    [
        ({"seed": 1, "settings": {"beta": 2.0, "inner": {"a": 1}}}, "seed"),
        ({"seed": 0, "settings": {"beta": 3.0, "inner": {"a": 2}}}, "settings.beta, settings.inner.a"),
        ({"seed": 0}, "settings"),
        ({"seed": 0, "settings": {"beta": 2.0, "inner": {"a": 1}}, "more": None, "yet": 1}, "yet"),
    ],
)
def test_a_different_manifest_is_refused_by_the_keys_that_differ(
    tmp_path: Path, manifest: dict[str, Any], keys: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"seed": 0, "settings": {"beta": 2.0, "inner": {"a": 1}}}))
    with pytest.raises(DataError) as raised:
        matches_manifest(tmp_path / "run.json", manifest, "a run with different")
    assert raised.value.message == f"folder {str(tmp_path)!r} holds a run with different {keys}."


def test_pickles_are_named_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert describe_pickles(tmp_path) == ""
    for name in ("b.pt", "a.bin"):
        (tmp_path / name).touch()
    assert describe_pickles(tmp_path).startswith("; it holds a.bin, b.pt, which is never read")
