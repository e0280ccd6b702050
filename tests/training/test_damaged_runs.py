"""Damaged files of a run: an error that names the file, and the right result once it is deleted; never a wrong one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mavis
from mavis.errors import DataError
from mavis.rewards import Brevity
from mavis.rollouts import RolloutSettings
from mavis.training import FitSettings, ImprovementSettings, improve

PROMPTS = ["Once upon a time", "The dog"]
SETTINGS = ImprovementSettings(
    iterations=2,
    rollouts=8,
    composition="independent",
    calibration_samples=1,
    sampling=RolloutSettings(max_new_tokens=4, shard_size=4),
    fit=FitSettings(epochs=1),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    policy, tokenizer = mavis.embedded.load()
    folder = tmp_path_factory.mktemp("finished")
    run(policy, tokenizer, folder)
    return policy, tokenizer, folder


def run(policy: Any, tokenizer: Any, folder: Path) -> dict[str, torch.Tensor]:
    critic = mavis.HiddenStateCritic.for_policy(policy, ["short"], hidden=8, composition="independent")
    for _ in improve(policy, tokenizer, critic, {"short": Brevity()}, PROMPTS, folder, SETTINGS):
        pass
    return critic.state_dict()


def test_flipped_bits_and_cut_files_are_named_or_harmless(finished: tuple[Any, Any, Path], tmp_path: Path) -> None:
    policy, tokenizer, whole = finished
    expected, draw = run(policy, tokenizer, whole), random.Random(0)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file() and path.suffix != ".md")
    errors: list[str] = []
    read = [name for name in names if name.parts[0] != "critic"]  # what a rerun reads
    for number, name in enumerate(read * 2):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        if number % 2:  # so that the damaged shards are read
            for path in (*folder.glob("iteration-*/report.json"),):
                if path != folder / name:
                    path.unlink()
        content = bytearray((folder / name).read_bytes())
        if number % 3 == 0:
            del content[draw.randrange(len(content)) :]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(content)
        try:
            found = run(policy, tokenizer, folder)
        except DataError as error:
            errors.append(str(error))
        else:
            assert all(torch.equal(found[key], expected[key]) for key in expected), name
        shutil.rmtree(folder)
    assert len(errors) > len(read)
    assert all(str(tmp_path / "run") in error for error in errors)


@pytest.mark.parametrize(
    "damaged",
    [
        "start/model.safetensors",
        "iteration-0/critic/config.json",
        "iteration-0/critic/model.safetensors",
        "iteration-0/report.json",
        "iteration-1/rollouts/shard-00000/data-00000-of-00001.arrow",
        "iteration-1/rollouts/shard-00000/state.json",
        "iteration-1/rollouts/shard-00000/sha256.json",
        "iteration-1/rollouts/plan.json",
    ],
)
def test_what_the_error_says_to_delete_is_made_again(
    finished: tuple[Any, Any, Path], tmp_path: Path, damaged: str
) -> None:
    policy, tokenizer, whole = finished
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    if "rollouts" in damaged:
        (folder / "iteration-1" / "report.json").unlink()
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="delete") as raised:
        run(policy, tokenizer, folder)
    named = Path(raised.value.message.split("'")[1])
    if "rollouts" in damaged or damaged.endswith("report.json"):
        assert named in ((folder / damaged), (folder / damaged).parent)
    if named.is_dir():
        shutil.rmtree(named)
    else:
        named.unlink()
    found, expected = run(policy, tokenizer, folder), run(policy, tokenizer, whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
