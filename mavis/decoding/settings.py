"""Which strengths, candidates and temperatures a tilt can have, and which the critic was trained with."""

from __future__ import annotations

import math
import warnings
from typing import Final, Literal

from mavis.critics import Calibration, Critic, CriticGroup, TrainedDecoding
from mavis.decoding.weights import strength_rows
from mavis.errors import DecodingError

AsTrained = Literal["as_trained"]

AS_TRAINED: Final = "as_trained"
"""Stands for the candidates or the temperature that the critic was trained with."""


def trained_top_k(top_k: int | AsTrained | None, critic: Critic) -> int | None:
    """Resolve `as_trained` to the number of candidates that a critic was trained with.

    Args:
        top_k: K ≥ 1, None for every token, or `as_trained`.
        critic: one, or a group of several.

    Returns:
        K or None; None for a critic that does not know how it was trained.

    Raises:
        DecodingError: if the critics of a group were trained with different numbers of candidates.
    """
    return top_k if not isinstance(top_k, str) else _trained("top_k", critic).top_k


def trained_temperature(temperature: float | AsTrained, critic: Critic) -> float:
    """Resolve `as_trained` to the temperature that a critic was trained at; see `trained_top_k`."""
    return (
        float(temperature) if not isinstance(temperature, str) else float(_trained("temperature", critic).temperature)
    )


def _trained(name: str, critic: Critic) -> TrainedDecoding:
    members = list(critic.critics) if isinstance(critic, CriticGroup) else [critic]
    known = [one.decoding for one in members if isinstance(one, Critic) and one.decoding is not None]
    values = {getattr(one, name): one for one in known}
    if len(values) > 1:
        raise DecodingError(
            f"{name} is 'as_trained', but the critics were trained with different ones: {', '.join(map(str, values))}.",
            f"pass {name} to say which.",
        )
    return next(iter(values.values()), TrainedDecoding())


def check_settings(
    beta: object, target_kl: float | None, top_k: int | AsTrained | None, temperature: float | AsTrained
) -> None:
    """Refuse what no tilt can have; see `MavisTilt` for the arguments.

    Raises:
        DecodingError: naming the first that is wrong.
    """
    if beta is not None and target_kl is not None:
        raise DecodingError(f"beta is {beta} and target_kl is {target_kl}; both set the strength.", "give one of them.")
    if beta is not None:
        strength_rows(beta)  # type: ignore[arg-type]
    if target_kl is not None and not (isinstance(target_kl, int | float) and 0 < target_kl < math.inf):
        raise DecodingError(f"target_kl is {target_kl!r}, expected nats > 0.", "2.0 is a moderate budget.")
    if top_k not in (None, AS_TRAINED) and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise DecodingError(
            f"top_k is {top_k!r}, expected a whole number ≥ 1, None or 'as_trained'.", "None means every token."
        )
    if temperature == AS_TRAINED:
        return
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise DecodingError(
            f"temperature is {temperature!r}, expected a number > 0 or 'as_trained'.", "1.0 leaves the policy as it is."
        )


def check_calibration(
    calibration: Calibration | None,
    target_kl: float | None,
    top_k: int | None,
    temperature: float,
    *,
    stacklevel: int = 2,
) -> None:
    """See that a strength is taken from a calibration for these candidates and this temperature.

    A strength found for others can be several times too strong. Without a budget that only warns.

    Args:
        calibration: the critic's, if it has one.
        target_kl: the budget that was asked for, or None for the critic's default.
        top_k: K, or None for every token.
        temperature: T.
        stacklevel: of the warning.

    Raises:
        DecodingError: if a budget was asked for that was measured otherwise.
    """
    if calibration is None or (calibration.top_k, calibration.temperature) == (top_k, temperature):
        return
    said = (
        f"the critic was calibrated with top_k={calibration.top_k} and temperature={calibration.temperature:g}, but "
        f"the tilt has top_k={top_k} and temperature={temperature:g}."
    )
    hint = "pass the calibrated values, or give beta."
    if target_kl is not None:
        raise DecodingError(f"target_kl is {target_kl:g}; {said}", hint)
    warnings.warn(
        f"beta is not given; {said} The default may be too strong: {hint}", UserWarning, stacklevel=stacklevel
    )
