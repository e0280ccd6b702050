"""Checks the settings of a tilt, and resolves those that are taken from the critic's training."""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from mavis.critics import Calibration, Critic, CriticGroup, TrainedDecoding
from mavis.decoding.weights import strength_rows
from mavis.errors import DecodingError, MavisError, check_number, check_whole, warn_user

AsTrained = Literal["as_trained"]

AS_TRAINED: Final = "as_trained"
"""The candidates or the temperature that the critic was trained with."""


LEAST_TEMPERATURE = 1e-20


def trained_top_k(top_k: int | AsTrained | None, critic: Critic) -> int | None:
    """Resolve `as_trained` to the number of candidates that a critic was trained with.

    Args:
        top_k: K ≥ 1, None for every token, or `as_trained`.
        critic: one, or a group of several.

    Returns:
        K or None; None for a critic that does not record how it was trained.

    Raises:
        DecodingError: if the critics of a group were trained with different numbers of candidates.
    """
    return top_k if not isinstance(top_k, str) else _trained("top_k", critic).top_k


def trained_temperature(temperature: float | AsTrained, critic: Critic) -> float:
    """Resolve `as_trained` to the temperature that a critic was trained at; see `trained_top_k`."""
    return (
        float(temperature) if not isinstance(temperature, str) else float(_trained("temperature", critic).temperature)
    )


def trained_length(critic: Critic) -> int:
    """Return the longest response, in tokens, that a critic was trained with; see `trained_top_k`."""
    return _trained("max_new_tokens", critic).max_new_tokens


def _trained(name: str, critic: Critic) -> TrainedDecoding:
    members = list(critic.critics) if isinstance(critic, CriticGroup) else [critic]
    recorded = [
        decoding
        for one in members
        if isinstance(one, Critic)
        and (decoding := one.decoding or (one.calibration.decoding if one.calibration is not None else None))
    ]
    values = {getattr(decoding, name): decoding for decoding in recorded}
    if len(values) > 1:
        raise DecodingError(
            f"{name} is 'as_trained', but the critics were trained with {' and '.join(map(str, values))}.",
            f"pass {name} explicitly.",
        )
    return next(iter(values.values()), TrainedDecoding())


def check_temperature(error: type[MavisError], temperature: object, hint: str) -> None:
    """Check that scores divided by a temperature stay within single precision.

    Args:
        error: the class to raise.
        temperature: T.
        hint: for what is no number > 0.

    Raises:
        MavisError: of class `error`.
    """
    check_number(error, hint, low=0, strict=True, temperature=temperature)
    if float(temperature) < LEAST_TEMPERATURE:  # type: ignore[arg-type]
        raise error(
            f"temperature is {temperature!r}, expected at least {LEAST_TEMPERATURE:g}.",
            "1e-3 already is nearly greedy; do_sample=False is greedy decoding.",
        )


def check_settings(
    beta: object,
    target_kl: float | None,
    top_k: int | AsTrained | None,
    temperature: float | AsTrained,
    entropy_gate: float | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Check the settings of a tilt; see `MavisTilt` for the arguments.

    Raises:
        DecodingError: for the first that is out of range.
    """
    if beta is not None and target_kl is not None:
        raise DecodingError(f"beta is {beta} and target_kl is {target_kl}; both set the strength.", "give one of them.")
    if beta is not None:
        strength_rows(beta)  # type: ignore[arg-type]
    if target_kl is not None:
        hint = "2.0 nats per response is a moderate budget."
        check_number(DecodingError, hint, low=0, strict=True, target_kl=target_kl)
    if top_k not in (None, AS_TRAINED):
        hint = "None makes every token a candidate, 'as_trained' takes the critic's number."
        check_whole(DecodingError, hint, top_k=top_k)
    if temperature != AS_TRAINED:
        check_temperature(
            DecodingError, temperature, "1.0 leaves the policy as it is, 'as_trained' takes the critic's."
        )
    if entropy_gate is not None:
        hint = "0.1 nats skip the steps that are nearly certain, None tilts every step."
        check_number(DecodingError, hint, low=0, entropy_gate=entropy_gate)
    if max_new_tokens is not None:
        check_whole(DecodingError, "it is the length that target_kl is spent over.", max_new_tokens=max_new_tokens)


def check_calibration(
    calibration: Calibration | None,
    target_kl: float | None,
    top_k: int | None,
    temperature: float,
) -> None:
    """Check that a calibration was measured with these candidates and this temperature.

    With others, its strengths can be several times too strong. Without a KL budget this only warns.

    Args:
        calibration: the critic's, if it has one.
        target_kl: the KL budget, or None for the critic's default strength.
        top_k: K, or None for every token.
        temperature: T.

    Raises:
        DecodingError: if a budget is given and the calibration was measured with other settings.
    """
    if calibration is None or (calibration.top_k, calibration.temperature) == (top_k, temperature):
        return
    problem = (
        f"the critic was calibrated with top_k={calibration.top_k} and temperature={calibration.temperature:g}, but "
        f"the tilt has top_k={top_k} and temperature={temperature:g}."
    )
    hint = "pass the calibrated values, or give beta."
    if target_kl is not None:
        raise DecodingError(f"target_kl is {target_kl:g}; {problem}", hint)
    warn_user(f"beta is not given; {problem} The default may be too strong: {hint}")


_CUTS: tuple[tuple[str, float], ...] = (
    ("top_p", 1.0),
    ("min_p", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("top_h", math.inf),
)
"""What `generate` cuts a sampled distribution by after its logits processors, with the value that has no effect."""


def disagreement(config: Any, candidates: int, temperature: float) -> str | None:
    """Describe what `generate` does to the distribution after the tilt.

    Args:
        config: the generation config in force, with every default filled in.
        candidates: the number of tokens that the tilt leaves, at most.
        temperature: T of the tilt.

    Returns:
        What and how to avoid it, or None if samples come from the tilted distribution.
    """
    found, mended = [], []
    if config.do_sample:
        if (config.temperature or 1.0) != temperature:
            found.append(f"divides by temperature={config.temperature:g}, but the tilt has temperature={temperature:g}")
            mended.append(f"temperature={temperature:g}")
        cuts = {name: getattr(config, name, None) for name, neutral in _CUTS}
        cuts = {name: cuts[name] for name, neutral in _CUTS if cuts[name] not in (None, neutral)}
        if config.top_k and config.top_k < candidates:
            cuts = {"top_k": config.top_k} | cuts
        if cuts:
            found.append(f"cuts the tilted distribution by {', '.join(f'{name}={cuts[name]:g}' for name in cuts)}")
            neutral = {"top_k": "0", "top_h": "None"} | {name: f"{value:g}" for name, value in _CUTS if name != "top_h"}
            mended += [f"{name}={neutral[name]}" for name in cuts]
    if getattr(config, "watermarking_config", None) is not None:
        found.append("adds a watermark to the tilted distribution")
        mended.append("watermarking_config=None")
    if not found:
        return None
    return (
        f"after the tilt, generate {' and '.join(found)}. Hint: pass {', '.join(mended)} to generate, or use "
        "mavis.generate, which sets both sides."
    )
