"""Parses and checks the tilt arguments of a request to a serving engine, and turns them into λ."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mavis.critics import Critic
from mavis.decoding.settings import check_calibration, check_settings
from mavis.decoding.weights import lambda_rows
from mavis.errors import MavisError, RequestError, closest

PREFIX = "mavis_"
WEIGHTS, BETA, TARGET_KL, TOP_K = "mavis_weights", "mavis_beta", "mavis_target_kl", "mavis_top_k"
DEFAULT_TOP_K = 40
"""Candidates of a request that names none, for critics that do not record what they were trained with."""
_KNOWN = (WEIGHTS, BETA, TARGET_KL, TOP_K)
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Tilt:
    """The parsed tilt of one request.

    Args:
        lam: (M,) float32 on the CPU, λ = β·w, not all 0.
        top_k: number of candidates K; None makes every token a candidate.
        temperature: T > 0, by which the engine divides afterwards; 1 for a greedy request, which takes the most likely
            token of the distribution at T = 1.
    """

    lam: Tensor
    top_k: int | None
    temperature: float


def asks_for_tilt(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request has any argument that starts with `mavis_`; None counts as absent."""
    return any(name.startswith(PREFIX) and value is not None for name, value in (extra_args or {}).items())


def parse_tilt(
    extra_args: Mapping[str, Any] | None, temperature: float, critic: Critic, max_new_tokens: int | None = None
) -> Tilt | None:
    """Parse the tilt that a request asks for; the arguments mean what they mean to `MavisTilt`.

    Args:
        extra_args: the request's arguments. `mavis_weights` is M numbers, a mapping, or text such as
            `helpful=0.7,short=0.3`. `mavis_beta` ≥ 0 in 1 / reward or `mavis_target_kl` > 0 in nats sets the strength;
            without either, the critic's calibrated default is used. `mavis_top_k` is 1 to V candidates, or 0 for every
            token; 40 by default. Other arguments are ignored.
        temperature: T of the request, 0 for greedy decoding.
        critic: provides the objectives, the calibration and the range of λ; see `Critic.describe`.
        max_new_tokens: the request's `max_tokens`, over which a KL budget is spent; None is the calibrated length.

    Returns:
        The tilt, or None if the request asks for none or λ is 0, which is the plain policy.

    Raises:
        RequestError: naming the argument, for anything that cannot be used.

    Examples:
        >>> import mavis
        >>> from mavis.vllm.request_arguments import parse_tilt
        >>> critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
        >>> arguments = {"mavis_weights": "positive=0.5", "mavis_beta": 4.0, "mavis_top_k": 0}
        >>> parse_tilt(arguments, 1.0, critic)
        Tilt(lam=tensor([2., 0.]), top_k=None, temperature=1.0)
    """
    if not asks_for_tilt(extra_args):
        return None
    assert extra_args is not None
    given = {name: value for name, value in extra_args.items() if name.startswith(PREFIX) and value is not None}
    for name in given:
        if name not in _KNOWN:
            raise RequestError(
                f"{name if name.isprintable() and len(name) < 100 else _short_repr(name)} is not a tilt argument.",
                closest(name[:100], _KNOWN),
            )
    if WEIGHTS not in given:
        raise RequestError(
            f"{WEIGHTS} is missing, but {', '.join(given)} is given.",
            f"write e.g. {WEIGHTS}='{critic.objectives[0]}=1'.",
        )
    for name in (BETA, TARGET_KL):
        if name in given and not _is_number(given[name]):
            raise RequestError(f"{name} is {_short_repr(given[name])}, expected a number.", "write e.g. 2.0.")
    beta, target_kl, top_k = given.get(BETA), given.get(TARGET_KL), _parse_top_k(given, critic)
    strength = TARGET_KL if target_kl is not None else BETA
    temperature = temperature if temperature >= _GREEDY_BELOW else 1.0
    try:
        check_settings(beta, target_kl, top_k, temperature)
        if beta is None:
            check_calibration(critic.calibration, target_kl, top_k, temperature)
    except MavisError as error:
        raise RequestError(f"{strength}: {error.message}", error.hint) from error
    weights = _parse_weights(given[WEIGHTS])
    try:
        lambda_rows(weights, critic, 1.0, None)
    except MavisError as error:
        raise RequestError(f"{WEIGHTS}: {error.message}", error.hint) from error
    try:
        rows = lambda_rows(weights, critic, beta, target_kl, max_new_tokens)
    except MavisError as error:
        raise RequestError(f"{strength}: {error.message}", error.hint) from error
    critic.warn_outside_trained_range(rows)
    lam = rows[0].float()
    return Tilt(lam, top_k, float(temperature)) if bool(lam.any()) else None


def _is_number(value: object) -> bool:
    """Whether a value is a number that reaches an engine in another process unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63


def _short_repr(value: object) -> str:
    """Abbreviate a value: error messages are sent back to the client that caused them."""
    return reprlib.repr(value)


def _parse_weights(given: Any) -> dict[str, float] | list[float]:
    """Parse weights from the types that survive serialisation to an engine's process: text, a list, or a mapping."""
    if isinstance(given, Mapping) and all(isinstance(name, str) and _is_number(one) for name, one in given.items()):
        return dict(given)
    if isinstance(given, list | tuple) and all(map(_is_number, given)):
        return list(given)
    if not isinstance(given, str):
        raise RequestError(
            f"{WEIGHTS} is {_short_repr(given)}, expected a list of numbers, a mapping from names to numbers, or text.",
            "write e.g. 'helpful=0.7,short=0.3'.",
        )
    weights: dict[str, float] = {}
    for part in given.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not equals or not math.isfinite(value):
            raise RequestError(
                f"{WEIGHTS} is {_short_repr(given)}, but {_short_repr(part.strip())} is not of the form name=number.",
                "write e.g. 'helpful=0.7,short=0.3'.",
            )
        if name in weights:
            raise RequestError(
                f"{WEIGHTS} is {_short_repr(given)}, which names {_short_repr(name)} twice.",
                "name every objective once.",
            )
        weights[name] = value
    return weights


def _parse_top_k(given: Mapping[str, Any], critic: Critic) -> int | None:
    top_k, vocabulary = given.get(TOP_K), critic.fingerprint.vocab_size
    if TOP_K not in given:
        return min(DEFAULT_TOP_K, vocabulary) if critic.decoding is None else critic.decoding.top_k
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= vocabulary:
        raise RequestError(
            f"{TOP_K} is {_short_repr(top_k)}, expected a whole number from 0 to {vocabulary}.",
            "0 makes every token a candidate.",
        )
    return top_k or None
