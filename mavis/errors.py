"""The errors a user can meet; each says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class MavisError(Exception):
    """A mistake that the caller can mend.

    Args:
        message: names the argument, its value and what was expected.
        hint: what to do next, one sentence.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} Hint: {hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[MavisError], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # so that it comes back whole from another process


class WeightsError(MavisError):
    """Preference weights that cannot be used: unknown names, wrong shapes, values that are not finite."""


class DecodingError(MavisError):
    """A decoding step that cannot be tilted: bad beta or top_k, or scores that match no caught hidden state."""


class RequestError(DecodingError, ValueError):
    """Arguments of one request to a serving engine that cannot be used.

    A ValueError too, which engines answer with status 400.
    """


class CriticError(MavisError):
    """A critic that cannot be built, saved, loaded or attached."""


class MissingPackageError(MavisError):
    """An optional package that is not installed; nothing is wrong with what was asked."""


class ObjectiveError(MavisError):
    """An objective that cannot be built or that returns something other than one finite float per response."""


class DataError(MavisError):
    """Prompts or rollouts that cannot be read."""


class ConfigError(MavisError):
    """A setting of a command that cannot be used."""


class TrainingError(MavisError):
    """A fit that came to nothing."""


class ProcessError(MavisError):
    """Several processes of one job that do not go together, or one that has lost another."""


class PolicyError(MavisError):
    """A policy that cannot be loaded or steered."""


class VectorError(MavisError):
    """Alignment vectors that cannot be made, read, combined, applied or searched."""


class PreferenceError(MavisError):
    """Pairs of responses that cannot tell preference weights."""


class EvaluationError(MavisError):
    """A quantity that the given evaluation data cannot support."""


def check_whole(error: type[MavisError], hint: str, least: int = 1, **values: object) -> None:
    """Refuse values that are no whole numbers or too small.

    Args:
        error: what to raise.
        hint: its hint.
        least: the smallest that is allowed.
        values: by the name of the argument.

    Raises:
        MavisError: of the kind of `error`, naming the first of them.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise error(f"{name} is {value!r}, expected a whole number ≥ {least}.", hint)


PAD_ON_THE_LEFT = "tokenizer(prompts, return_tensors='pt', padding=True, padding_side='left')."
"""The hint for prompts that are padded on the wrong side, or are no tensors."""


def optional(module: str, purpose: str, extra: str, other: str = "") -> Any:
    """Import what only some uses of mavis need.

    Args:
        module: its name.
        purpose: what needs it.
        extra: the extra of mavis that brings it.
        other: what could be done instead, to go on the hint.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed.",
            f"pip install 'mavis[{extra}]'{other}.",
        ) from error


def first_sentence(error: BaseException) -> str:
    """Quote what a library says in one line, without its end: the rest is about its own options."""
    return " ".join(str(error).split(". ")[0].split())[:200].rstrip(" :.") or type(error).__name__


def closest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant.

    Args:
        name: what the caller wrote.
        known: the names that exist.

    Returns:
        `did you mean 'x'?` for a near match, else `known: a, b`.
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}."
