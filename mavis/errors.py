"""Errors that say what is wrong and what to do about it, and the checks of arguments that raise them."""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import warnings
from collections.abc import Iterable
from numbers import Real
from types import FrameType
from typing import Any


class MavisError(Exception):
    """A mistake that the caller can correct.

    Args:
        message: names the argument, its value and what was expected.
        hint: what to do next, one sentence.

    Examples:
        >>> import mavis
        >>> try:
        ...     mavis.MavisTilt([1.0], beta=-2.0)
        ... except mavis.MavisError as error:
        ...     print(error.message)
        beta is -2.0, expected a finite number ≥ 0.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} Hint: {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[MavisError], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # both survive the way from a worker process


class WeightsError(MavisError):
    """Preference weights that cannot be used: unknown names, wrong shapes, or values that are not finite."""


class DecodingError(MavisError):
    """A decoding step that cannot be tilted: a bad beta or top_k, or scores that match no captured hidden state."""


class RequestError(DecodingError, ValueError):
    """Arguments of a request to a serving engine that cannot be used.

    It is a ValueError too, which engines answer with status 400.
    """


class CriticError(MavisError):
    """A critic that cannot be built, saved, loaded or attached."""


class MissingPackageError(MavisError):
    """An optional package that is not installed."""


class ObjectiveError(MavisError):
    """An objective that cannot be built or that returns something other than one finite float per response."""


class DataError(MavisError):
    """Prompts or rollouts that cannot be read."""


class PromptError(DataError):
    """A conversation that cannot be used, or that the tokenizer's chat template cannot render."""


class ConfigError(MavisError):
    """A setting of a command that cannot be used."""


class TrainingError(MavisError):
    """A fit that diverged or has nothing to learn from."""


class ProcessError(MavisError):
    """Processes of one job that disagree, or one whose peers have stopped."""


class PolicyError(MavisError):
    """A policy that cannot be loaded or steered."""


class VectorError(MavisError):
    """Alignment vectors that cannot be extracted, read, combined, applied or searched."""


class PreferenceError(MavisError):
    """Pairs of responses from which preference weights cannot be inferred."""


class EvaluationError(MavisError):
    """A quantity that the given evaluation data cannot support."""


def check_whole(error: type[MavisError], hint: str, least: int = 1, /, **values: object) -> None:
    """Check that values are whole numbers and large enough.

    Args:
        error: the class to raise.
        hint: its hint.
        least: the smallest allowed value.
        values: the arguments to check, by name.

    Raises:
        MavisError: of class `error`, for the first value that fails.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise error(f"{name} is {value!r}, expected a whole number ≥ {least}.", hint)


def check_number(
    error: type[MavisError],
    hint: str,
    /,
    *,
    low: float | None = None,
    high: float | None = None,
    strict: bool = False,
    **values: object,
) -> None:
    """Check that values are finite numbers within bounds.

    Args:
        error: the class to raise.
        hint: its hint.
        low: the lower bound, if there is one.
        high: the upper bound, included, if there is one.
        strict: whether `low` itself is excluded.
        values: the arguments to check, by name.

    Raises:
        MavisError: of class `error`, for the first value that fails.
    """
    bounds = [] if low is None else [f"{'>' if strict else '≥'} {low:g}"]
    bounds += [] if high is None else [f"≤ {high:g}"]
    for name, value in values.items():
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        above = low is None or number > low or (number == low and not strict)
        if not (math.isfinite(number) and above and (high is None or number <= high)):
            raise error(f"{name} is {value!r}, expected a finite number{' and'.join(f' {b}' for b in bounds)}.", hint)


PAD_ON_THE_LEFT = "tokenizer(prompts, return_tensors='pt', padding=True, padding_side='left')."
"""The hint for prompts that are padded on the wrong side or are not tensors."""


def warn_user(message: str) -> None:
    """Warn of something that works but may not be meant, at the line of the user's own code that led to it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


_NOT_THE_USERS = ("contextlib", "mavis", "torch", "transformers")


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def import_optional(module: str, purpose: str, extra: str, alternative: str = "") -> Any:
    """Import a module that only some features need.

    Args:
        module: its name.
        purpose: the feature that needs it.
        extra: the optional-dependency group of `mavis-decoding` that installs it.
        alternative: another way out, appended to the hint.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed.",
            f"pip install 'mavis-decoding[{extra}]'{alternative}.",
        ) from error


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's error on one line; what follows is about the library's own options."""
    return " ".join(str(error).split(". ")[0].split())[:200].rstrip(" :.") or type(error).__name__


def closest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that was probably meant.

    Args:
        name: what the caller wrote.
        known: the names that exist.

    Returns:
        `did you mean 'x'?` for a near match, else `known: a, b`.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}."
