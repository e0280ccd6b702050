"""Files and folders that are replaced whole or not at all, and manifests that keep runs apart."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mavis
from mavis.errors import DataError
from mavis.utils.files import (
    atomic_file,
    atomic_folder,
    describe_pickles,
    matches_manifest,
    read_json,
    restore_folder,
    sweep,
    write_json,
)


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


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two folders in one step."""
    monkeypatch.setattr("mavis.utils.files._exchange", lambda one, other: False)


def test_a_folder_that_cannot_be_moved_into_place_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_steps: None
) -> None:
    target = tmp_path / "target"
    write_folder(target, "first")
    replace = os.replace

    def fails(source: Any, goal: Any) -> None:
        if Path(goal) == target and "-old-" not in str(source):
            raise OSError("full")
        replace(source, goal)

    monkeypatch.setattr("mavis.utils.files.os.replace", fails)
    with pytest.raises(OSError, match="full"):
        write_folder(target, "second")
    assert text_of(target) == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_are_replaced_in_two_steps_where_they_cannot_be_exchanged(tmp_path: Path, two_steps: None) -> None:
    target = tmp_path / "target"
    for text in ("first", "second"):
        write_folder(target, text)
        assert text_of(target) == text
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need two steps")
def test_linux_exchanges_folders_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "target", "first")
    monkeypatch.setattr("mavis.utils.files._replace_in_two_steps", None)
    write_folder(tmp_path / "target", "second")
    assert text_of(tmp_path / "target") == "second"


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write_folder(tmp_path / "disk" / "target", "first")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    write_folder(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert text_of(tmp_path / "disk" / "target") == "second"
    assert len(list(tmp_path.rglob(".*"))) == 0


def cut_at_each_step(folder: Path, write: str, two_steps: bool) -> list[Path]:
    """Return folders in which a process that replaces `target` was killed before each of its system calls in turn."""
    script = f"""
import itertools, os, sys, types
from pathlib import Path
sys.modules["mavis"] = types.ModuleType("mavis")  # without its imports, which take seconds
sys.modules["mavis"].__path__ = {mavis.__path__!r}
import mavis.utils.files as files
if {two_steps}:
    files._exchange = lambda one, other: False
STEPS = ("open", "os.rename", "os.chmod", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir")
def write(target, cut):
    left = cut
    def audit(event, arguments):
        nonlocal left
        left -= event in STEPS
        if left == 0:
            os.kill(os.getpid(), 9)
    sys.addaudithook(audit)
    {write}
for cut in itertools.count(1):
    target = Path(sys.argv[1]) / str(cut) / "target"
    with files.{"atomic_folder" if "folder" in write else "atomic_file"}(target) as temporary:
        (temporary / "inside").mkdir() if temporary.is_dir() else None
        (temporary / "inside" / "a.txt" if temporary.is_dir() else temporary).write_text("first")
    if (child := os.fork()) == 0:
        write(target, cut)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    return list(folder.iterdir())


WRITE_FOLDER = """
    with files.atomic_folder(target) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "a.txt").write_text("second")
"""
WRITE_FILE = """
    with files.atomic_file(target) as temporary:
        temporary.write_text("second")
"""


@pytest.mark.parametrize(("write", "steps"), [(WRITE_FOLDER, False), (WRITE_FOLDER, True), (WRITE_FILE, False)])
def test_whenever_a_writer_is_killed_one_version_stands_and_the_next_write_sweeps_up(
    tmp_path: Path, write: str, steps: bool
) -> None:
    seen = set()
    for folder in cut_at_each_step(tmp_path, write, steps):
        target = folder / "target"
        restore_folder(target)
        seen.add(text_of(target))
        (write_folder if write is WRITE_FOLDER else write_file)(folder / "other", "more")
        assert sorted(path.name for path in folder.iterdir()) == ["other", "target"]
        assert text_of(target) in ("first", "second")
    assert seen == {"first", "second"}


def test_what_running_processes_and_other_machines_write_is_not_swept_up(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as own, atomic_file(tmp_path / "b") as file:
        foreign = tmp_path / own.name.replace(own.name[7:15], "0" * 8)
        parent = tmp_path / own.name.replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
        foreign.mkdir()
        parent.mkdir()
        write_file(tmp_path / "c", "c")
        assert {own, file, foreign, parent} <= set(tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["a", "b", "c"]
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(foreign, (yesterday, yesterday))
    write_file(tmp_path / "c", "c")
    assert not foreign.exists()
    assert parent.exists()


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_says_who_may_read_what_is_written(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", "a")
        with atomic_folder(tmp_path / "folder") as temporary, atomic_file(tmp_path / "weights") as weights:
            (temporary / "inner").mkdir()
            for path in (weights, temporary / "weights", temporary / "inner" / "weights"):
                save_file({"a": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    folders, files = ("folder", "folder/inner"), ("file", "weights", "folder/weights", "folder/inner/weights")
    assert modes == dict.fromkeys(folders, folder_mode) | dict.fromkeys(files, file_mode)


def test_a_folder_in_a_shared_one_belongs_to_its_group(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    write_folder(tmp_path / "folder", "a")
    assert (tmp_path / "folder").stat().st_mode & stat.S_ISGID


def test_a_machine_of_the_same_name_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text
    with atomic_folder(tmp_path / "a") as temporary, monkeypatch.context() as patch:
        running = tmp_path / temporary.name.replace(f"-{os.getpid()}-", "-99999999-")
        running.mkdir()
        patch.setattr(Path, "read_text", lambda path, **kw: "b" if path.name == "boot_id" else read_text(path, **kw))
        sweep(tmp_path)
        assert running.is_dir()
    sweep(tmp_path)
    assert not running.exists()


def test_a_folder_moved_aside_before_the_machine_was_restarted_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / ".mavis-00000000-1-old-00000000.run"
    write_folder(aside / "old", "a")
    restore_folder(tmp_path / "run")
    assert aside.exists()
    before = time.time() - 120
    os.utime(aside, (before, before))
    restore_folder(tmp_path / "run")
    assert text_of(tmp_path / "run") == "a"


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
    (tmp_path / "rollouts" / "shard-00000").mkdir(parents=True)
    with pytest.raises(DataError) as raised:
        matches_manifest(tmp_path / "run.json", manifest, "a run with different")
    assert raised.value.message == f"folder {str(tmp_path)!r} holds a run with different {keys}."


def test_a_manifest_without_results_claims_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"seed": 0})
    (tmp_path / "start").mkdir()
    assert not matches_manifest(tmp_path / "run.json", {"seed": 1}, "a run with different")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"a": 1', b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000])
def test_damaged_json_is_an_error_that_names_the_file(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "report.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"report\.json' is damaged"):
        read_json(tmp_path / "report.json")


def test_json_of_others_may_have_infinite_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json", strict=False) == {"time_step_limit": [0.0, float("inf")]}


def test_pickles_are_named_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert describe_pickles(tmp_path) == ""
    for name in ("b.pt", "a.bin"):
        (tmp_path / name).touch()
    assert describe_pickles(tmp_path).startswith("; it holds a.bin, b.pt, which is never read")
