"""The search for coefficients finds an optimum, is reproducible, resumes, and reports when no score is finite."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from mavis.errors import MissingPackageError, VectorError
from mavis.vectors import search_coefficients

pytest.importorskip("optuna")


def quadratic(coefficients: dict[str, float]) -> float:
    """The maximum is 2, at medical 0.4 and legal −0.6."""
    return 2 - (coefficients["medical"] - 0.4) ** 2 - (coefficients["legal"] + 0.6) ** 2


NAMES = ["medical", "legal"]


def test_it_finds_the_optimum_of_a_quadratic() -> None:
    found = search_coefficients(quadratic, NAMES, trials=60)
    assert found.score == pytest.approx(2, abs=0.02)
    assert found.coefficients == pytest.approx({"medical": 0.4, "legal": -0.6}, abs=0.12)
    assert found.score == quadratic(found.coefficients) == max(score for _, score in found.history if score is not None)
    assert len(found.history) == 60
    assert found.history[0] == ({"medical": 0.0, "legal": 0.0}, quadratic({"medical": 0, "legal": 0}))


def test_the_bounds_are_respected() -> None:
    found = search_coefficients(quadratic, NAMES, bounds={"medical": (0.5, 2), "legal": (-3, -1)}, trials=25)
    assert all(0.5 <= c["medical"] <= 2 and -3 <= c["legal"] <= -1 for c, _ in found.history)
    assert found.history[0][0] == {"medical": 0.5, "legal": -1.0}  # as close to 0 as possible
    assert found.score > quadratic({"medical": 1.0, "legal": -1.5})


def test_equal_seeds_agree_and_different_seeds_differ() -> None:
    one, again, other = (search_coefficients(quadratic, NAMES, trials=15, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_an_interrupted_search_resumes_and_ends_the_same(tmp_path: Path) -> None:
    whole = search_coefficients(quadratic, NAMES, trials=16)
    storage, calls = tmp_path / "new" / "search.jsonl", 0

    def broken(coefficients: dict[str, float]) -> float:
        nonlocal calls
        calls += 1
        if calls in (1, 8):
            raise KeyboardInterrupt
        return quadratic(coefficients)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search_coefficients(broken, NAMES, trials=16, storage=storage)
    resumed = search_coefficients(broken, NAMES, trials=16, storage=storage)
    assert resumed == whole
    assert calls == 16 + 2
    assert search_coefficients(broken, NAMES, trials=16, storage=storage) == whole
    assert calls == 16 + 2
    assert search_coefficients(quadratic, NAMES, trials=18, storage=storage).history[:16] == whole.history


def test_scores_that_are_not_finite_are_failed_trials() -> None:
    def partly(coefficients: dict[str, float]) -> float:
        return math.nan if coefficients["medical"] < 0 else quadratic(coefficients)

    found = search_coefficients(partly, NAMES, trials=30)
    failed = [coefficients for coefficients, score in found.history if score is None]
    assert failed
    assert all(coefficients["medical"] < 0 and set(coefficients) == set(NAMES) for coefficients in failed)
    assert len(found.history) == 30
    assert found.coefficients["medical"] >= 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_search_without_a_finite_score_is_an_error(bad: float) -> None:
    with pytest.raises(VectorError, match="score was not finite in any of 3 trials"):
        search_coefficients(lambda _: bad, NAMES, trials=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, r"names is \[\], expected at least one"),
        ({"names": ["a", "a"]}, "every name once"),
        ({"trials": 0}, "trials is 0, expected a whole number ≥ 1"),
        ({"trials": 1.5}, "trials is 1.5, expected a whole number ≥ 1"),
        ({"bounds": (1, -1)}, r"bounds is \(1, -1\), expected the lower one first"),
        ({"bounds": (0, math.inf)}, "the upper bound is inf"),
        ({"bounds": 1}, "bounds is 1. Hint: pass two numbers"),
        ({"bounds": {"a": (0, 1)}}, "bounds and names differ in 'b'"),
        ({"bounds": {"a": (0, 1), "b": (0, 1), "bb": (0, 1)}}, "bounds and names differ in 'bb'. Hint: "),
    ],
)
def test_invalid_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"names": ["a", "b"]} | changes
    with pytest.raises(VectorError, match=message):
        search_coefficients(lambda _: 0.0, **arguments)


def test_storage_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = tmp_path / "search.jsonl"
    search_coefficients(quadratic, NAMES, trials=2, storage=storage)
    for other in ({"seed": 1}, {"bounds": (0, 1)}):
        with pytest.raises(
            VectorError, match="holds a search with different names, bounds or seed. Hint: name a new file"
        ):
            search_coefficients(quadratic, NAMES, trials=2, storage=storage, **other)  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    with pytest.raises(VectorError, match="which holds no search"):
        search_coefficients(quadratic, NAMES, trials=2, storage=tmp_path / "notes.txt")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match="search_coefficients needs optuna, which is not installed"):
        search_coefficients(quadratic, NAMES)


def test_a_torn_last_line_loses_nothing_before_it(tmp_path: Path) -> None:
    whole = search_coefficients(quadratic, NAMES, trials=8)
    storage = tmp_path / "search.jsonl"
    search_coefficients(quadratic, NAMES, trials=5, storage=storage)
    with storage.open("ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "x", "stu')
    for _ in range(2):
        assert search_coefficients(quadratic, NAMES, trials=8, storage=storage) == whole
    notes = tmp_path / "notes.txt"
    notes.write_text("hello\nworld")
    with pytest.raises(VectorError, match="which holds no search"):
        search_coefficients(quadratic, NAMES, trials=2, storage=notes)
    assert notes.read_text().startswith("hello\nworld")


def test_storage_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VectorError, match="which holds no search"):
        search_coefficients(quadratic, NAMES, trials=2, storage=tmp_path / "file" / "search.jsonl")


@pytest.mark.parametrize("score", [None, "high"])
def test_a_score_that_is_not_a_number_is_refused(score: Any) -> None:
    with pytest.raises(VectorError, match=f"score returned {score!r}, expected a number"):
        search_coefficients(lambda _: score, NAMES, trials=2)
