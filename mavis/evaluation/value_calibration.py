"""Whether the heads' predictions come true."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from mavis.critics.head_critic import HeadCritic
from mavis.evaluation.statistics import calibration_table
from mavis.math.returns import soft_returns
from mavis.rollouts.replay import Sequences, replay
from mavis.rollouts.sampling import RolloutSettings

_MOST_RESPONSES = 240


def value_calibration(
    policy: Any,
    critic: HeadCritic,
    reference: dict[str, list[Any]],
    sweep: dict[str, list[Any]],
    sampling: RolloutSettings,
) -> list[dict[str, Any]]:
    """Compare Q_m(s_t, a_t) with the return that followed, where objective m alone was weighed.

        independent:  observed = R_m − (1/β) Σ_{t'>t} KL_{t'}
        conditioned:  observed = R_m, and Q_m is asked for λ = β·e_m

    One step per response is compared, at a quarter, a half and three quarters of its length in turn. An independent
    head is right at the β it was trained for, where slope 1 is expected; elsewhere the table shows how it drifts. A
    conditioned head should be right at every β.

    Args:
        policy: the reference policy.
        critic: whose heads are looked at.
        reference: columns of reference rollouts; they count as β = 0 for every objective.
        sweep: columns of tilted rollouts.
        sampling: that both were sampled with.

    Returns:
        One entry per objective and β: `objective`, `beta`, and what `Calibration` holds.
    """
    found = []
    for m, name in enumerate(critic.objectives):
        alone = [
            i for i, w in enumerate(sweep["weights"]) if w[m] == 1 and not any(x for k, x in enumerate(w) if k != m)
        ]
        for beta in [0.0, *sorted({sweep["beta"][i] for i in alone})]:
            columns = sweep if beta else reference
            rows = [i for i in alone if sweep["beta"][i] == beta] if beta else list(range(len(reference["beta"])))
            rows = [i for i in rows if columns["response_ids"][i]]
            rows = rows[:: math.ceil(len(rows) / _MOST_RESPONSES)]
            predicted, observed = _pairs(policy, critic, columns, rows, m, beta, sampling)
            table = asdict(calibration_table(predicted, observed))
            found.append({"objective": name, "beta": beta} | table)
    return found


def _pairs(
    policy: Any,
    critic: HeadCritic,
    columns: dict[str, list[Any]],
    rows: list[int],
    objective: int,
    beta: float,
    sampling: RolloutSettings,
) -> tuple[list[float], list[float]]:
    predicted: list[float] = []
    observed: list[float] = []
    zeta = 1 / beta if beta and not critic.conditioned else 0.0
    lam = torch.zeros(len(critic.objectives))
    lam[objective] = beta
    dummy = torch.zeros(critic.fingerprint.vocab_size, 1)
    for at in range(0, len(rows), 64):
        index = rows[at : at + 64]
        lists = [[columns[name][i] for i in index] for name in ("prompt_ids", "response_ids", "kl", "rewards")]
        prompts, responses, kl_rows, rewards = lists
        sequences = Sequences.pack(prompts, responses)
        steps = replay(policy, sequences, dummy, top_k=None, temperature=sampling.temperature)
        kl = torch.zeros(steps.kl.shape)
        for row, values in enumerate(kl_rows):
            kl[row, : len(values)] = torch.tensor(values)
        normalised = critic.normalise(torch.tensor(rewards, dtype=torch.float64)).float()
        returns = soft_returns(normalised, kl, zeta)[..., objective]
        lengths = steps.is_response.sum(1)
        quarter = torch.tensor([(i % 3) + 1 for i in range(at, at + len(index))], device=lengths.device)
        step = ((lengths - 1) * quarter // 4).clamp_min(0)
        which = torch.arange(len(index), device=step.device)
        with torch.no_grad():
            device = steps.states.device
            ids, is_token = sequences.ids.to(device), sequences.is_token.to(device)
            inputs = critic.inputs_of_rollouts(ids, is_token, steps.states)[which, step]
            asked = lam.to(inputs.device).expand(len(inputs), -1) if critic.conditioned else None
            values = critic.values_of_inputs(inputs, steps.action_ids[which, step][:, None], asked)
        predicted.extend(values[:, 0, objective].tolist())
        observed.extend(returns[which.cpu(), step.cpu()].tolist())
    return predicted, observed
