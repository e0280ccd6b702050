"""Searches that a file holds; what a resumed one finds is tested where searches are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mavis.errors import ConfigError
from mavis.utils.optuna_study import open_study, quiet_optuna, trial_sampler

optuna = pytest.importorskip("optuna")


def study_in(storage: Path | None, manifest: dict[str, Any] | None = None) -> Any:
    with quiet_optuna():
        return open_study(storage, manifest or {"seed": 0}, holds="a search with different seed", error=ConfigError)


def draw(study: Any, number: int) -> float:
    study.sampler = trial_sampler(7, number)
    trial = study.ask()
    value = trial.suggest_float("x", 0.0, 1.0)
    study.tell(trial, value)
    return value


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_in_a_file_is_found_again_and_draws_on(tmp_path: Path) -> None:
    whole = study_in(None)
    expected = [draw(whole, number) for number in range(4)]
    drawn = [draw(study_in(tmp_path / "study.jsonl"), number) for number in range(4)]
    assert drawn == expected
    assert len(study_in(tmp_path / "study.jsonl").trials) == 4


def test_a_file_of_another_search_is_refused(tmp_path: Path) -> None:
    study_in(tmp_path / "study.jsonl")
    with pytest.raises(
        ConfigError, match="study.jsonl', which holds a search with different seed. Hint: name a new file"
    ):
        study_in(tmp_path / "study.jsonl", {"seed": 1})


def test_a_file_that_is_no_study_is_refused_and_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("hello\nworld")
    with pytest.raises(ConfigError, match="notes.txt', which holds no search"):
        study_in(notes)
    assert notes.read_text().startswith("hello\nworld")


def test_optuna_is_silent_within_the_block_and_as_it_was_after_it() -> None:
    before = optuna.logging.get_verbosity()
    with quiet_optuna():
        assert optuna.logging.get_verbosity() == optuna.logging.WARNING
    assert optuna.logging.get_verbosity() == before
