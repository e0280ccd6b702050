"""Undoing what a command or a page does to the process of the tests."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore


@contextmanager
def restored_process(folder: Path) -> Iterator[None]:
    """Work in a folder, and afterwards undo what code may have done to its process.

    That is its arguments, working folder, standard input, import path, log handlers, threads, random numbers, and the
    objectives of one's own that are registered with Hydra.
    """
    root, arguments, previous, state = logging.getLogger(), sys.argv, Path.cwd(), torch.random.get_rng_state()
    handlers, level, threads, standard_input = list(root.handlers), root.level, torch.get_num_threads(), sys.stdin
    path = list(sys.path)
    os.chdir(folder)
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:], sys.argv, sys.stdin, sys.path[:] = handlers, arguments, standard_input, path
        ConfigStore.instance().repo.pop("objective", None)
        root.setLevel(level)
        os.chdir(previous)
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
