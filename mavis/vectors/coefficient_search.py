"""A search for coefficients that needs no gradients, only a score."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mavis.errors import VectorError, closest, import_optional
from mavis.utils.optuna_study import open_study, quiet_optuna, trial_sampler
from mavis.vectors.vector import finite

Bounds = tuple[float, float]


@dataclass(frozen=True)
class CoefficientSearch:
    """What a search has found.

    Args:
        coefficients: the best, by name.
        score: theirs.
        history: every trial in order, coefficients and score; the score is None where it was not finite.
    """

    coefficients: dict[str, float]
    score: float
    history: list[tuple[dict[str, float], float | None]]


def search_coefficients(
    score: Callable[[dict[str, float]], float],
    names: Iterable[str],
    *,
    bounds: Bounds | Mapping[str, Bounds] = (-1.0, 1.0),
    trials: int = 50,
    seed: int = 0,
    storage: str | os.PathLike[str] | None = None,
) -> CoefficientSearch:
    """Look for the coefficients with the highest score, by tree-structured Parzen estimators.

    The first trial is at 0, the plain policy. A search that is broken off and repeated with the same `storage` goes on
    where it stopped and ends with what it would have found undisturbed.

    Args:
        score: of coefficients by name, higher is better; it may apply the vectors and generate. Where it is not finite
            the trial counts as failed.
        names: of the coefficients, such as a `Vectors`.
        bounds: lowest and highest coefficient, for all or by name.
        trials: how many scores are asked for, those of earlier calls with the same `storage` included.
        seed: repeats the search.
        storage: a file of JSON lines that keeps the trials; made if it does not exist.

    Returns:
        The best coefficients, their score, and all trials.

    Raises:
        VectorError: if there is no name, bounds or trials are out of range, the storage holds another search or cannot
            be written, a score is no number, or no score was finite.
        MissingPackageError: if optuna is not installed.

    Source: TPE: Bergstra et al. (NeurIPS 2011), as in optuna.
    """
    limits = _checked_bounds(list(names), bounds)
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise VectorError(f"trials is {trials!r}, expected an integer ≥ 1.", "trials=50 is a start for two names.")
    optuna = import_optional("optuna", "search_coefficients", "vectors")
    with quiet_optuna():
        study = open_study(
            storage,
            {"bounds": {n: list(b) for n, b in limits.items()}, "seed": seed},
            holds="a search with different names, bounds or seed",
            error=VectorError,
        )
        states = optuna.trial.TrialState
        over = (states.COMPLETE, states.FAIL)
        for number in range(len(study.get_trials(deepcopy=False, states=over)), trials):
            if number == 0:
                start = {name: min(max(0.0, low), high) for name, (low, high) in limits.items()}
                study.enqueue_trial(start)
            study.sampler = trial_sampler(seed, number)
            trial = study.ask()
            found = _number(score({name: trial.suggest_float(name, *limits[name]) for name in limits}))
            if math.isfinite(found):
                study.tell(trial, found)
            else:
                study.tell(trial, state=states.FAIL)
        ended = study.get_trials(deepcopy=False, states=over)
    history = [(dict(trial.params), trial.value) for trial in ended]
    if all(value is None for _, value in history):
        raise VectorError(f"score was not finite in any of {len(history)} trials.", "try it by hand, e.g. with zeros.")
    coefficients, best = max(history, key=lambda entry: -math.inf if entry[1] is None else entry[1])
    assert best is not None
    return CoefficientSearch(coefficients, best, history)


def _checked_bounds(names: list[str], bounds: Bounds | Mapping[str, Bounds]) -> dict[str, Bounds]:
    if not names or len(set(names)) != len(names):
        raise VectorError(f"names is {names}, expected at least one and every name once.", "e.g. ['medical', 'legal'].")
    if isinstance(bounds, Mapping):
        for name in {*bounds} ^ {*names}:
            raise VectorError(
                f"bounds and names differ in {name!r}.", closest(name, names if name in bounds else bounds)
            )
    limits = {}
    for name in names:
        pair = bounds[name] if isinstance(bounds, Mapping) else bounds
        try:
            low, high = pair
        except (TypeError, ValueError) as error:
            raise VectorError(f"bounds is {pair!r}.", "give two numbers, such as (-1, 1).") from error
        limits[name] = finite(low, "the lower bound"), finite(high, "the upper bound")
        if not limits[name][0] < limits[name][1]:
            raise VectorError(f"bounds is {pair!r}, expected the lower one first.", "e.g. (-1, 1).")
    return limits


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        raise VectorError(f"score returned {found!r}, expected a number.", "return one; higher is better.") from error
