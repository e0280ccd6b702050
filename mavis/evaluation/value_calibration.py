"""Calibration of the value heads: their predictions against the returns that followed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mavis.critics import Critic
from mavis.critics.group import value_critics
from mavis.critics.head_critic import HeadCritic
from mavis.evaluation.statistics import CalibrationRow, calibration_table
from mavis.math.returns import soft_returns
from mavis.rollouts.replay import Sequences, replay
from mavis.rollouts.sampling import RolloutSettings

_MAX_RESPONSES = 240
_REPLAY_ROWS = 64


@dataclass(frozen=True)
class ValueCalibration:
    """Calibration of one objective's head at one β; see `mavis.evaluation.statistics.Calibration`.

    Attributes:
        objective: its name.
        beta: at which the objective alone was weighted; 0 is the reference policy.
        rows: bins of similar predictions.
        slope: of observed on predicted.
        intercept: of the same line.
        r_squared: of the predictions themselves.
    """

    objective: str
    beta: float
    rows: tuple[CalibrationRow, ...]
    slope: float | None
    intercept: float | None
    r_squared: float | None


def value_calibration(
    policy: Any,
    critic: Critic,
    reference: Mapping[str, list[Any]],
    sweep: Mapping[str, list[Any]],
    sampling: RolloutSettings,
) -> list[ValueCalibration]:
    """Compare Q_m(s_t, a_t) with the return that followed, where only objective m was weighted.

        independent:  observed = R_m − (1/β) Σ_{t'>t} KL_{t'}
        conditioned:  observed = R_m, with Q_m evaluated at λ = β·e_m

    One step per response is compared, at a quarter, a half and three quarters of its length in turn. An independent
    head should have slope 1 at the β it was trained for; at other β the table shows how it drifts. A conditioned head
    should have slope 1 at every β.

    Args:
        policy: the reference policy.
        critic: whose heads are compared; a group has those of its members.
        reference: columns of reference rollouts, which count as β = 0 for every objective.
        sweep: columns of tilted rollouts.
        sampling: how both were sampled.

    Returns:
        One entry per objective and β.
    """
    found = []
    own = [(member, m) for member in value_critics(critic) for m in range(len(member.objectives))]
    for m, (name, head) in enumerate(zip(critic.objectives, own, strict=True)):
        only = [
            i for i, w in enumerate(sweep["weights"]) if w[m] == 1 and not any(x for k, x in enumerate(w) if k != m)
        ]
        for beta in [0.0, *sorted({sweep["beta"][i] for i in only})]:
            columns = sweep if beta else reference
            rows = [i for i in only if sweep["beta"][i] == beta] if beta else list(range(len(reference["beta"])))
            rows = [i for i in rows if columns["response_ids"][i]]
            rows = rows[:: math.ceil(len(rows) / _MAX_RESPONSES)]
            table = calibration_table(*_predictions(policy, *head, columns, rows, m, beta, sampling))
            found.append(ValueCalibration(name, beta, table.rows, table.slope, table.intercept, table.r_squared))
    return found


def _predictions(
    policy: Any,
    critic: HeadCritic,
    head: int,
    columns: Mapping[str, list[Any]],
    rows: Sequence[int],
    objective: int,
    beta: float,
    sampling: RolloutSettings,
) -> tuple[list[float], list[float]]:
    """Return the predicted value and the observed return of one step per response.

    The critic's head of the objective is `head`; the objective has the index `objective` in the columns.
    """
    predicted: list[float] = []
    observed: list[float] = []
    zeta = 1 / beta if beta and not critic.conditioned else 0.0
    mean, std = float(critic.reward_mean[head]), float(critic.reward_std[head])
    lam = torch.zeros(len(critic.objectives))
    lam[head] = beta
    # `replay` averages a table over tokens; nothing is read from this one.
    table = torch.zeros(critic.fingerprint.vocab_size, 1)
    for start in range(0, len(rows), _REPLAY_ROWS):
        index = rows[start : start + _REPLAY_ROWS]
        prompts, responses, step_kls, rewards = (
            [columns[name][i] for i in index] for name in ("prompt_ids", "response_ids", "kl", "rewards")
        )
        sequences = Sequences.pack(prompts, responses)
        steps = replay(policy, sequences, table, top_k=None, temperature=sampling.temperature)
        kl = torch.zeros(steps.kl.shape)
        for row, values in enumerate(step_kls):
            kl[row, : len(values)] = torch.tensor(values)
        raw = torch.tensor([row[objective] for row in rewards], dtype=torch.float64)
        returns = soft_returns(((raw - mean) / std).float()[:, None], kl, zeta)[..., 0]
        lengths = steps.is_response.sum(1)
        quarter = torch.tensor([(i % 3) + 1 for i in range(start, start + len(index))], device=lengths.device)
        step = ((lengths - 1) * quarter // 4).clamp_min(0)
        response = torch.arange(len(index), device=step.device)
        with torch.no_grad():
            device = steps.states.device
            ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
            inputs = critic.rollout_inputs(ids, is_token, steps.states)[response, step]
            lams = lam.to(inputs.device).expand(len(inputs), -1) if critic.conditioned else None
            values = critic.values_from_inputs(inputs, steps.action_ids[response, step][:, None], lams)
        predicted.extend(values[:, 0, head].tolist())
        observed.extend(returns[response.cpu(), step.cpu()].tolist())
    return predicted, observed
