"""Dynamic programming in a world: exact values of any tilt, the optimum, and both ways of iterating towards it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mavis.exact.world import World
from mavis.math.kl import step_kl
from mavis.math.tilt import tilted_logprobs


@dataclass(frozen=True)
class Evaluation:
    """What a tilted policy earns in a world, and what it costs.

    The token process is deterministic: what follows an action depends on the counts before it and on the token, not on
    the token before that.

    Args:
        values: (T, S, V, M) float64, Q_m(step, counts, token) = E_π[R_m | the token is taken], normalised.
        kl_to_come: (T, S, V) float64, K = E_π[Σ of later steps' KL | the token is taken], nats.
        rewards: (M,) float64, E_π[R_m] from the start.
        kl: () float64, E_π[Σ_t KL_t] from the start, nats.
    """

    values: Tensor
    kl_to_come: Tensor
    rewards: Tensor
    kl: Tensor


def evaluate_tilt(world: World, tilt: Tensor) -> Evaluation:
    """Evaluate π ∝ π_ref · exp(tilt) by backward induction.

        Q_t(c, a) = W_{t+1}(c + a, a),   W_t(c, s) = Σ_a π_t(a|c, s) Q_t(c, a),   W_T(c, ·) = R(c)

    and the same for K, where every step adds its own KL.

    Args:
        world: the world.
        tilt: (T, S, V, V) float64 by step, counts, last token and token; (T, S, 1, V) where the last token does not
            matter.

    Returns:
        The evaluation.
    """
    counts, objectives = world.rewards.shape
    following = world.next_counts
    ahead = torch.cat([world.rewards, torch.zeros(counts, 1, dtype=torch.float64)], dim=1)
    ahead = ahead[:, None, :].expand(-1, world.tokens, -1)  # (S, last token, M + 1)
    every_token = torch.arange(world.tokens)
    actions = []
    for step in reversed(range(world.steps)):
        logprobs = tilted_logprobs(world.logprobs, tilt[step])  # (S, V, V)
        taken = ahead[following, every_token]  # (S, token, M + 1)
        actions.append(taken)
        ahead = logprobs.exp() @ taken
        ahead[..., objectives] += step_kl(logprobs, world.logprobs)
    values = torch.stack(actions[::-1])
    start = ahead[0].mean(0)
    return Evaluation(values[..., :objectives], values[..., objectives], start[:objectives], start[objectives])


def optimum(world: World, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Find the tilt of the optimal policy by soft backward induction.

        tilt*_t(c, a) = L_{t+1}(c + a, a),   L_t(c, s) = log Σ_a π_ref(a|s) exp(tilt*_t(c, a)),   L_T(c, ·) = λ·R(c)

    Args:
        world: the world.
        lam: (M,), λ = β·w.

    Returns:
        tilt*: (T, S, 1, V) float64, and β·J* = E[L_0], a number.

    Source: KL-regularised control (Todorov, PNAS 2009), here with a deterministic token process.
    """
    following, every_token = world.next_counts, torch.arange(world.tokens)
    ahead = (world.rewards @ lam.double())[:, None].expand(-1, world.tokens)
    tilts = []
    for _ in range(world.steps):
        tilt = ahead[following, every_token]
        tilts.append(tilt[:, None, :])
        ahead = torch.logsumexp(world.logprobs + tilt[:, None, :], dim=-1)
    return torch.stack(tilts[::-1]), ahead[0].mean()


def goal(evaluation: Evaluation, lam: Tensor) -> Tensor:
    """Compute β·J = λ·E[R] − KL, a number in nats."""
    return evaluation.rewards @ lam.double() - evaluation.kl


def share(world: World, tilt: Tensor, lam: Tensor) -> float:
    """Compute how much of what can be gained over the reference policy a tilt gains.

        share = (J − J_ref) / (J* − J_ref)

    Args:
        world: the world.
        tilt: see `evaluate_tilt`.
        lam: (M,), λ = β·w, not all zero.

    Returns:
        At most 1; negative if the tilt is worse than none.
    """
    nothing = world.rewards.new_zeros(1, 1, 1, 1).expand(world.steps, len(world.rewards), 1, world.tokens)
    reference = goal(evaluate_tilt(world, nothing), lam)
    return float((goal(evaluate_tilt(world, tilt), lam) - reference) / (optimum(world, lam)[1] - reference))


def iterate(
    world: World, weights: Tensor, beta: float, composition: Literal["independent", "conditioned"]
) -> Iterator[Tensor]:
    """Improve a tilt round by round, with exact values.

        conditioned:  tilt ← Σ_m λ_m Q_m − K of the policy that the tilt makes
        independent:  tilt_m ← β Q_m − K of the policy that tilt_m makes, for each objective;  tilt = Σ_m w_m tilt_m

    Args:
        world: the world.
        weights: (M,), the w that the tilt is for.
        beta: β > 0.
        composition: how objectives' values are put together.

    Yields:
        (T, S, 1, V) float64 tilts without end; the first is made of the reference policy's values.

    Source: `independent` is MAVIS (arXiv 2508.13415) with ζ = 1/β; `conditioned` is soft policy iteration for the
    weighted goal itself.
    """
    weights = weights.double()
    mixtures = beta * (weights[None] if composition == "conditioned" else torch.eye(len(weights), dtype=torch.float64))
    shape = world.steps, len(world.rewards), 1, world.tokens
    tilts = [torch.zeros(shape, dtype=torch.float64) for _ in mixtures]
    while True:
        evaluations = [evaluate_tilt(world, tilt) for tilt in tilts]
        tilts = [
            (evaluation.values @ lam - evaluation.kl_to_come)[:, :, None, :]
            for evaluation, lam in zip(evaluations, mixtures, strict=True)
        ]
        if composition == "conditioned":
            yield tilts[0]
        else:
            yield torch.einsum("m,mtcsv->tcsv", weights, torch.stack(tilts))
