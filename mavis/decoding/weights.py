"""Converts weights by name and a strength or KL budget to λ = β·w as a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mavis.critics import Critic
from mavis.errors import DecodingError, WeightsError, closest

Weights = Mapping[str, float] | Sequence[float] | Sequence[Mapping[str, float]] | Sequence[Sequence[float]] | Tensor


LARGEST_LAMBDA = 1e30
"""The largest |λ|, so that its products with values stay within single precision."""


def weight_rows(weights: Weights, objectives: Sequence[str], *, whose: str = "the critic") -> Tensor:
    """Convert preference weights to rows of numbers in the order of the objectives.

    Args:
        weights: a mapping from objective to weight (missing ones are 0), M numbers, or one of either per prompt: a list
            of mappings, a list of lists, or a tensor (M,) or (R, M). Finite; need not sum to one.
        objectives: the M names.
        whose: the owner of the objectives in errors.

    Returns:
        (R, M) float64 on the CPU; R = 1 if one set of weights is for every prompt.

    Raises:
        WeightsError: for an unknown name, an empty mapping, a wrong length or a value that is not finite.
    """
    if isinstance(weights, Tensor):
        rows = weights.detach().to("cpu", torch.float64)
        rows = rows[None] if rows.dim() == 1 else rows
    elif isinstance(weights, Mapping):
        rows = _named_row(weights, objectives, whose)[None]
    elif isinstance(weights, Sequence) and not isinstance(weights, str) and len(weights) > 0:
        if all(isinstance(row, Mapping) for row in weights):
            rows = torch.stack([_named_row(row, objectives, whose) for row in weights])  # type: ignore[arg-type]
        else:
            rows = _number_rows(weights, objectives)
    else:
        raise WeightsError(
            f"weights is {weights!r}, expected weights for: {', '.join(objectives)}.",
            f"write e.g. weights={{{objectives[0]!r}: 1.0}}.",
        )
    if rows.dim() != 2 or rows.shape[1] != len(objectives) or not len(rows):
        raise WeightsError(
            f"weights has shape {tuple(rows.shape)}, but {whose} has {len(objectives)} objectives: "
            f"{', '.join(objectives)}.",
            f"give {len(objectives)} numbers, or one row of {len(objectives)} per prompt.",
        )
    for row, column in (~rows.isfinite()).nonzero().tolist():
        raise WeightsError(
            f"weights for objective {objectives[column]!r} is {rows[row, column].item()}, expected a finite number.",
            "a weight of 0 ignores an objective.",
        )
    return rows


def _named_row(weights: Mapping[str, float], objectives: Sequence[str], whose: str) -> Tensor:
    if not weights:
        raise WeightsError(
            f"weights is empty, but {whose} has: {', '.join(objectives)}.",
            "name at least one objective; for the plain policy use beta=0.",
        )
    for name in weights:
        if name not in objectives:
            raise WeightsError(
                f"weights names objective {name!r}, but {whose} has: {', '.join(objectives)}.",
                closest(str(name), objectives),
            )
    try:
        return torch.tensor([float(weights.get(name, 0.0)) for name in objectives], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"weights is {dict(weights)}, expected numbers.", "write e.g. 0.5.") from error


def _number_rows(weights: Sequence[Any], objectives: Sequence[str]) -> Tensor:
    try:
        rows = torch.tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"weights is {weights!r}, expected {len(objectives)} numbers ({', '.join(objectives)}) or rows of as many.",
            "a mapping from name to number is the safest form; do not mix forms.",
        ) from error
    return rows[None] if rows.dim() == 1 else rows


def strength_rows(beta: float | Sequence[float] | Tensor) -> Tensor:
    """Convert β to one number per row.

    Args:
        beta: a number, or one per prompt; finite and ≥ 0, in 1 / reward.

    Returns:
        (R,) float64 on the CPU.

    Raises:
        DecodingError: if a value is negative or not finite.
    """
    try:
        rows = torch.as_tensor(beta, dtype=torch.float64).detach().cpu().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DecodingError(f"beta is {beta!r}, expected a number ≥ 0 or one per prompt.", "write e.g. 4.0.") from error
    bad = ~(rows.isfinite() & (rows >= 0))
    if bad.any() or not len(rows):
        value = rows[bad][0].item() if len(rows) else beta
        raise DecodingError(
            f"beta is {value}, expected a finite number ≥ 0.",
            "beta is the strength of the tilt (the inverse of the β of DPO and RLHF); 0 is the plain policy.",
        )
    return rows


def lambda_rows(
    weights: Weights,
    critic: Critic,
    beta: float | Sequence[float] | Tensor | None,
    target_kl: float | None,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Compute λ = β·w for every row of weights.

    Args:
        weights: as for `weight_rows`.
        critic: names the objectives, and provides β if none is given.
        beta: strength, one for all or one per prompt; None takes the critic's calibrated default.
        target_kl: KL budget in nats per response instead of a strength; needs a calibrated critic.
        max_new_tokens: the length that the budget is spent over; None is the length of the calibration.

    Returns:
        (R, M) float64 on the CPU.

    Raises:
        WeightsError: see `weight_rows`; also if weights and beta have different numbers of rows.
        DecodingError: if beta is bad, or the critic carries no calibration to take it from.
        CriticError: if the budget lies outside the calibration.
    """
    rows = weight_rows(weights, critic.objectives)
    if beta is not None:
        strength = strength_rows(beta)
    elif critic.calibration is None:
        given = "beta and target_kl are not given" if target_kl is None else f"target_kl is {target_kl}"
        raise DecodingError(
            f"{given}, and the critic carries no calibration to derive beta from.",
            "give beta=..., or calibrate the critic (mavis train does so at its end).",
        )
    else:
        # A budget is for a response of the requested length; the default is one strength for every length.
        if target_kl is None:
            beta_of = critic.calibration.default_beta
        else:
            length = critic.calibration.max_new_tokens if max_new_tokens is None else max_new_tokens
            beta_of = partial(critic.calibration.beta_at_length, target_kl=target_kl, max_new_tokens=length)
        strength = torch.tensor([beta_of(row) if bool(row.any()) else 0.0 for row in rows], dtype=torch.float64)
    if len(rows) > 1 and len(strength) > 1 and len(rows) != len(strength):
        raise WeightsError(
            f"weights has {len(rows)} rows but beta has {len(strength)}.",
            "give one of each per prompt, or one for all.",
        )
    lam = strength[:, None] * rows
    largest = float(lam.abs().max())
    if not largest <= LARGEST_LAMBDA:
        raise WeightsError(
            f"beta · weights is {largest:g} in size, expected at most {LARGEST_LAMBDA:g}.",
            "use smaller weights or a smaller beta; far smaller ones already leave the best token alone.",
        )
    return lam


def check_prompt_groups(prompt_ids: Tensor, rows: int) -> None:
    """Check that each row of weights is used for copies of one prompt.

    Args:
        prompt_ids: (B, P) integer.
        rows: R, a divisor of B; row r of the weights is used for batch rows r·B/R to (r + 1)·B/R − 1.

    Raises:
        WeightsError: if the prompts of such a group differ.
    """
    grouped = prompt_ids.unflatten(0, (rows, -1))
    same = (grouped == grouped[:, :1]).flatten(1).all(dim=1)
    if not bool(same.all()):
        first = int((~same).nonzero()[0])
        size = grouped.shape[1]
        raise WeightsError(
            f"weights has {rows} rows for {len(prompt_ids)} prompts: row {first} would be used for batch rows "
            f"{first * size} to {(first + 1) * size - 1}, but their prompts differ.",
            "give one row of weights per prompt.",
        )
