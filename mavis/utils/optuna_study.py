"""Optuna studies stored in a file, so that interrupted searches resume."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mavis.errors import MavisError, first_sentence


def open_study(
    storage: str | os.PathLike[str] | None,
    manifest: Mapping[str, Any],
    *,
    directions: Sequence[str] = ("maximize",),
    holds: str,
    error: type[MavisError],
) -> Any:
    """Open the study in a file, or create one; optuna must be installed.

    Args:
        storage: a journal of JSON lines, created if it does not exist; None keeps the study in memory.
        manifest: identifies the search, JSON-serialisable; a file serves one search.
        directions: `maximize` or `minimize` for each value of a trial.
        holds: what the file holds if the manifests differ, such as `a search with different seed`.
        error: the class to raise.

    Returns:
        The `optuna.study.Study`.

    Raises:
        MavisError: of class `error`, if the file holds another search or none, or cannot be written.
    """
    optuna = importlib.import_module("optuna")
    if storage is None:
        return optuna.create_study(directions=list(directions))
    journal = importlib.import_module("optuna.storages.journal")
    path = Path(storage).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        backend = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
        study = optuna.create_study(
            directions=list(directions), storage=backend, study_name="mavis", load_if_exists=True
        )
        found = study.user_attrs.get("search")
        if found is None:
            study.set_user_attr("search", dict(manifest))
    except (OSError, json.JSONDecodeError, KeyError, ValueError, TypeError) as problem:
        raise error(
            f"storage is {str(storage)!r}, which holds no search: {first_sentence(problem)}.", "name a new file."
        ) from problem
    if found not in (None, manifest):
        raise error(
            f"storage is {str(storage)!r}, which holds {holds}.",
            "name a new file, or repeat the search exactly to resume.",
        )
    return study


def trial_sampler(seed: int, number: int, *, constant_liar: bool = False) -> Any:
    """Create the sampler of one trial, with a seed of its own so that resumed searches match uninterrupted ones.

    Args:
        seed: of the search.
        number: of the trial.
        constant_liar: whether running trials count as bad ones, which keeps concurrent trials apart.

    Source: tree-structured Parzen estimators, Bergstra et al. (NeurIPS 2011), as in optuna.
    """
    samplers = importlib.import_module("optuna.samplers")
    return samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32, multivariate=True, constant_liar=constant_liar)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence optuna's log line for every trial."""
    logging = importlib.import_module("optuna.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _cut_torn_line(path: Path) -> None:
    """Drop a line that was cut short when a search was killed: optuna would append to it and could not read either."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        lines = file.read()
        # Only in a journal: no other file is changed.
        if lines.startswith(b'{"op_code"') and not lines.endswith(b"\n"):
            file.truncate(lines.rfind(b"\n") + 1)
