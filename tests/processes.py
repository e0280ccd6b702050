"""Running code that changes its process: working folder, arguments, standard input, log handlers, random numbers."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def restored_process(folder: Path, stdin: str = "") -> Iterator[None]:
    """Work in a folder, and afterwards undo what code may have done to the process."""
    root, arguments, previous, state = logging.getLogger(), sys.argv, Path.cwd(), torch.random.get_rng_state()
    handlers, level, threads, standard_input = list(root.handlers), root.level, torch.get_num_threads(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    os.chdir(folder)
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:], sys.argv, sys.stdin = handlers, arguments, standard_input
        root.setLevel(level)
        os.chdir(previous)
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
