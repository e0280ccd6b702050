"""The result of an evaluation, as dataclasses that convert to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mavis.evaluation.efficiency import RewardLimit, TargetEfficiency
from mavis.evaluation.pareto import ParetoFront
from mavis.evaluation.sweep_row import SweepRow
from mavis.evaluation.value_calibration import ValueCalibration
from mavis.policies import Prompt

_MIN_EFFECTIVE_SAMPLE_SIZE = 50.0  # as in `optimal_reward_at`


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` measured.

    Attributes:
        objectives: the critic's, in its order.
        prompts: the evaluation prompts.
        settings: the `EvaluationSettings` as plain data.
        normalisation: `mean` and `std` of the raw rewards by objective; rewards below are normalised with them.
        rows: the reference policy first (β = 0), then a row per weights and β.
        cut: the reference policy truncated to the tilt's candidates; None if every token is a candidate.
        efficiency: frontier efficiency at the target KLs, by weights.
        limits: the optimal frontier and best-of-n, by weights.
        front: the non-dominated rows and their hypervolume.
        values: calibration of the value heads, by objective and β.
        speed: `tokens_per_second` and `ratio` of `plain` and `tilted` decoding, and the `batch`; empty if not measured.

    Examples:
        See `evaluate`, which returns it:

        >>> from dataclasses import fields
        >>> from mavis.evaluation import EvaluationReport
        >>> [field.name for field in fields(EvaluationReport)][4:8]
        ['rows', 'cut', 'efficiency', 'limits']
    """

    objectives: list[str]
    prompts: list[Prompt]
    settings: dict[str, Any]
    normalisation: dict[str, dict[str, float]]
    rows: list[SweepRow]
    cut: SweepRow | None
    efficiency: list[TargetEfficiency]
    limits: list[RewardLimit]
    front: ParetoFront
    values: list[ValueCalibration]
    speed: dict[str, Any]

    def mean_efficiency(self, kl: float | None = None) -> float | None:
        """Average the frontier efficiency over all weights; see `mean_efficiency`."""
        return mean_efficiency(self.to_json(), kl)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as `report.json` holds it."""
        return asdict(self) | {
            "rows": [row.to_json() for row in self.rows],
            "cut": None if self.cut is None else self.cut.to_json(),
        }


def mean_efficiency(report: Mapping[str, Any], kl: float | None = None) -> float | None:
    """Average the frontier efficiency over all weights.

    A target KL that the critic's strongest tilt does not reach counts 0. Two kinds of targets are left out, as no
    critic could do better there: those below the KL that truncation to the candidates costs by itself, and those at
    which the optimal frontier rests on too few effective samples.

    Args:
        report: plain data, from `EvaluationReport.to_json` or a `report.json`.
        kl: the target KL, in nats per response; None averages over all targets.

    Returns:
        The mean; None if no target remains.
    """
    lowest = (report.get("cut") or {"kl": 0.0})["kl"]
    limits = {_key(limit["weights"]): limit for limit in report["limits"]}
    shares = []
    for entry in report["efficiency"]:
        limit = limits[_key(entry["weights"])]
        samples = np.interp(entry["kl"], limit["kl"], limit["effective_sample_size"])
        is_reachable = samples >= _MIN_EFFECTIVE_SAMPLE_SIZE and entry["kl"] >= lowest
        if (kl is None or entry["kl"] == kl) and (entry["efficiency"] is not None or is_reachable):
            shares.append(entry["efficiency"] or 0.0)
    return float(np.mean(shares)) if shares else None


def _key(weights: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(weights.items()))
