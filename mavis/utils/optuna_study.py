"""Studies of optuna that a file keeps, so that a search goes on where it was broken off."""

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
    claim: Mapping[str, Any],
    *,
    directions: Sequence[str] = ("maximize",),
    differs: str,
    error: type[MavisError],
) -> Any:
    """Open the study that a file keeps, or begin one; optuna must be installed.

    Args:
        storage: a file of JSON lines, made if it does not exist; None keeps the study in memory alone.
        claim: what the search is made of, plain data; a file serves one search.
        directions: `maximize` or `minimize` for each value of a trial.
        differs: what of a claim can differ, for the message.
        error: what to raise.

    Returns:
        The `optuna.study.Study`.

    Raises:
        MavisError: of the kind of `error`, if the file keeps another search, none, or cannot be written.
    """
    optuna = importlib.import_module("optuna")
    if storage is None:
        return optuna.create_study(directions=list(directions))
    journal = importlib.import_module("optuna.storages.journal")
    path = Path(storage).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        kept = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
        study = optuna.create_study(directions=list(directions), storage=kept, study_name="mavis", load_if_exists=True)
        kept_claim = study.user_attrs.get("search")
        if kept_claim is None:
            study.set_user_attr("search", dict(claim))
    except (OSError, json.JSONDecodeError, KeyError, ValueError, TypeError) as problem:
        raise error(
            f"storage is {str(storage)!r}, which keeps no search: {first_sentence(problem)}.", "name a new file."
        ) from problem
    if kept_claim not in (None, claim):
        raise error(
            f"storage is {str(storage)!r}, which keeps a search with other {differs}.",
            "name a new file, or repeat the search exactly to resume.",
        )
    return study


def sampler_of_trial(seed: int, number: int, *, constant_liar: bool = False) -> Any:
    """Make the sampler of one trial: one each, so that a search that goes on draws what an undisturbed one would draw.

    Args:
        seed: of the search.
        number: of the trial.
        constant_liar: whether trials that still run count as bad ones, which keeps those that run together apart.

    Source: tree-structured Parzen estimators, Bergstra et al. (NeurIPS 2011), as in optuna.
    """
    samplers = importlib.import_module("optuna.samplers")
    return samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32, multivariate=True, constant_liar=constant_liar)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep optuna from telling of every trial."""
    logging = importlib.import_module("optuna.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _cut_torn_line(path: Path) -> None:
    """Drop what was being written when a search was killed: optuna would write on behind it, and read neither."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        lines = file.read()
        # Only where it is a journal: no other file is touched.
        if lines.startswith(b'{"op_code"') and not lines.endswith(b"\n"):
            file.truncate(lines.rfind(b"\n") + 1)
