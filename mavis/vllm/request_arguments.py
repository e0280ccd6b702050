"""What a request to a serving engine says of its tilt: parsed, checked, and turned into λ."""

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
_KNOWN = (WEIGHTS, BETA, TARGET_KL, TOP_K)
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Tilt:
    """How one request is tilted.

    Args:
        lam: (M,) float32 on the CPU, λ = β·w, not all 0.
        top_k: number of candidates K, or None for every token.
        temperature: T > 0 that the engine divides by afterwards; 1 for a greedy request, which takes the likeliest
            token of the distribution at T = 1.
    """

    lam: Tensor
    top_k: int | None
    temperature: float


def asks_for_tilt(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request names any argument that is ours; None counts as not given."""
    return any(name.startswith(PREFIX) and value is not None for name, value in (extra_args or {}).items())


def read_tilt(extra_args: Mapping[str, Any] | None, temperature: float, critic: Critic) -> Tilt | None:
    """Read the tilt that a request asks for, as `MavisTilt` would from the same arguments.

    Args:
        extra_args: the request's own arguments. Ours are `mavis_weights`, M numbers, a mapping, or text such as
            `helpful=0.7,short=0.3`; `mavis_beta` ≥ 0 in 1 / reward or `mavis_target_kl` > 0 in nats, neither for the
            critic's calibrated default; `mavis_top_k`, 1 to V candidates, 0 for every token, 40 unless given. Others
            are left alone.
        temperature: T of the request, 0 for greedy decoding.
        critic: objectives, calibration and range are read from it; see `Critic.describe`.

    Returns:
        The tilt, or None if none is asked for or λ is 0, which is the plain policy.

    Raises:
        RequestError: naming the argument, for anything that cannot be used.
    """
    if not asks_for_tilt(extra_args):
        return None
    assert extra_args is not None
    given = {name: value for name, value in extra_args.items() if name.startswith(PREFIX) and value is not None}
    for name in given:
        if name not in _KNOWN:
            raise RequestError(f"{name} is no argument of a tilt.", closest(name, _KNOWN))
    if WEIGHTS not in given:
        raise RequestError(
            f"{WEIGHTS} is not given, but {', '.join(given)} is.", f"write e.g. {WEIGHTS}='{critic.objectives[0]}=1'."
        )
    for name in (BETA, TARGET_KL):
        if name in given and not _is_number(given[name]):
            raise RequestError(f"{name} is {_shown(given[name])}, expected a number.", "write e.g. 2.0.")
    beta, target_kl, top_k = given.get(BETA), given.get(TARGET_KL), _top_k(given, critic)
    used = TARGET_KL if target_kl is not None else BETA
    temperature = temperature if temperature >= _GREEDY_BELOW else 1.0
    try:
        check_settings(beta, target_kl, top_k, temperature)
        if beta is None:
            check_calibration(critic.calibration, target_kl, top_k, temperature)
    except MavisError as error:
        raise RequestError(f"{used}: {error.message}", error.hint) from error
    weights = _weights(given[WEIGHTS])
    try:
        lambda_rows(weights, critic, 1.0, None)
    except MavisError as error:
        raise RequestError(f"{WEIGHTS}: {error.message}", error.hint) from error
    try:
        rows = lambda_rows(weights, critic, beta, target_kl)
    except MavisError as error:
        raise RequestError(f"{used}: {error.message}", error.hint) from error
    critic.warn_outside_trained_range(rows)
    lam = rows[0].float()
    if not bool(lam.isfinite().all()):
        raise RequestError(f"{used} times {WEIGHTS} is too large to be computed.", "use a smaller beta or weights.")
    return Tilt(lam, top_k, float(temperature)) if bool(lam.any()) else None


def _is_number(value: object) -> bool:
    """Whether a value is a number that also an engine in another process is given as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63


def _shown(value: object) -> str:
    """Write a value down, a long one only in part: the answer to a mistake goes to who made it."""
    return reprlib.repr(value)


def _weights(given: Any) -> dict[str, float] | list[float]:
    """Read weights from what survives the way to an engine's process: text, a list, a mapping, and nothing else."""
    if isinstance(given, Mapping) and all(isinstance(name, str) and _is_number(one) for name, one in given.items()):
        return dict(given)
    if isinstance(given, list | tuple) and all(map(_is_number, given)):
        return list(given)
    if not isinstance(given, str):
        raise RequestError(
            f"{WEIGHTS} is {_shown(given)}, expected numbers, a mapping from names to numbers, or text.",
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
                f"{WEIGHTS} is {_shown(given)}, of which {_shown(part.strip())} is not a name, = and a finite number.",
                "write e.g. 'helpful=0.7,short=0.3'.",
            )
        if name in weights:
            raise RequestError(
                f"{WEIGHTS} is {_shown(given)}, which names {name!r} twice.", "name every objective once."
            )
        weights[name] = value
    return weights


def _top_k(given: Mapping[str, Any], critic: Critic) -> int | None:
    top_k, vocabulary = given.get(TOP_K, DEFAULT_TOP_K), critic.fingerprint.vocab_size
    if TOP_K not in given:
        return min(DEFAULT_TOP_K, vocabulary)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k <= vocabulary:
        raise RequestError(
            f"{TOP_K} is {_shown(top_k)}, expected a whole number from 0 to {vocabulary}.",
            "0 makes every token a candidate.",
        )
    return top_k or None
