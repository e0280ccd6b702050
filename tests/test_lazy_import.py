"""`import mavis` is quick: what is asked for is imported then."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

import mavis


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, mavis, mavis.cli; assert not {'torch', 'transformers', 'numpy', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", mavis.__all__)
def test_every_public_name_can_be_asked_for_first(name: str) -> None:
    assert getattr(mavis, name) is not None
    assert name in dir(mavis)


def test_rooms_are_attributes_and_other_names_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: Any = mavis
    assert rooms.rewards is importlib.import_module("mavis.rewards")
    with pytest.raises(AttributeError, match="module 'mavis' has no attribute 'rewardz'"):
        _ = rooms.rewardz


ROOMS = ["critics", "decoding", "rewards", "policies", "rollouts", "training", "evaluation"]

IMPORT_EACH = """
import importlib, os, sys
import torch, transformers  # once for all rooms: each is imported in a fork, which has no other
for room in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(f"mavis.{room}")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, room
"""


def test_every_room_can_be_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH, *ROOMS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
