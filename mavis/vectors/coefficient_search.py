"""Black-box search for the coefficients of alignment vectors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mavis.errors import VectorError, check_whole, closest, import_optional
from mavis.utils.optuna_study import open_study, quiet_optuna, trial_sampler
from mavis.vectors.vector import finite

Bounds = tuple[float, float]


@dataclass(frozen=True)
class CoefficientSearch:
    """The result of a search.

    Attributes:
        coefficients: the best ones, by name.
        score: of the best coefficients.
        history: coefficients and score of every trial in order; the score is None where it was not finite.

    Examples:
        >>> from mavis.vectors import search_coefficients
        >>> found = search_coefficients(lambda c: -abs(c["medical"]), ["medical"], trials=3)
        >>> found.coefficients, len(found.history)
        ({'medical': 0.0}, 3)
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
    """Search for the coefficients with the highest score, with tree-structured Parzen estimators.

    The first trial is at 0, the policy without vectors. Interrupted searches resume when rerun with the same `storage`,
    and find what they would have found without interruption.

    Args:
        score: of coefficients by name, higher is better; it may apply the vectors and generate. A trial whose score is
            not finite counts as failed.
        names: of the coefficients, such as a `Vectors`.
        bounds: lowest and highest coefficient, for all or by name.
        trials: total number of trials, including those of earlier calls with the same `storage`.
        seed: makes the search reproducible.
        storage: a JSON Lines file that stores the trials; created if it does not exist.

    Returns:
        The best coefficients, their score, and all trials.

    Raises:
        VectorError: if there is no name, bounds or trials are out of range, the storage holds another search or cannot
            be written, a score is not a number, or no score was finite.
        MissingPackageError: if optuna is not installed.

    Source: TPE, Bergstra et al. (NeurIPS 2011), as implemented by optuna.

    Examples:
        The score usually applies the vectors, generates and scores the responses; here it is a formula:

        >>> from mavis.vectors import search_coefficients
        >>> found = search_coefficients(lambda c: -((c["medical"] - 0.5) ** 2), ["medical"], trials=25)
        >>> abs(found.coefficients["medical"] - 0.5) < 0.1
        True
    """
    limits = _checked_bounds(list(names), bounds)
    check_whole(VectorError, "trials=50 is a start for two names.", trials=trials)
    optuna = import_optional("optuna", "search_coefficients", "vectors")
    with quiet_optuna():
        study = open_study(
            storage,
            {"bounds": {n: list(b) for n, b in limits.items()}, "seed": seed},
            holds="a search with different names, bounds or seed",
            error=VectorError,
        )
        states = optuna.trial.TrialState
        ended = (states.COMPLETE, states.FAIL)
        for number in range(len(study.get_trials(deepcopy=False, states=ended)), trials):
            if number == 0:
                start = {name: min(max(0.0, low), high) for name, (low, high) in limits.items()}
                study.enqueue_trial(start)
            study.sampler = trial_sampler(seed, number)
            trial = study.ask()
            value = _number(score({name: trial.suggest_float(name, *limits[name]) for name in limits}))
            if math.isfinite(value):
                study.tell(trial, value)
            else:
                study.tell(trial, state=states.FAIL)
        finished = study.get_trials(deepcopy=False, states=ended)
    history = [(dict(trial.params), trial.value) for trial in finished]
    if all(value is None for _, value in history):
        raise VectorError(f"score was not finite in any of {len(history)} trials.", "call it by hand, e.g. with zeros.")
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
            raise VectorError(f"bounds is {pair!r}.", "pass two numbers, such as (-1, 1).") from error
        limits[name] = finite(low, "the lower bound"), finite(high, "the upper bound")
        if not limits[name][0] < limits[name][1]:
            raise VectorError(f"bounds is {pair!r}, expected the lower one first.", "e.g. (-1, 1).")
    return limits


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise VectorError(f"score returned {value!r}, expected a number.", "return one; higher is better.") from error
