"""Dynamic programming in a world: exact values of a tilt, the optimal tilt, and policy iteration."""

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
class TiltEvaluation:
    """The values, rewards and KL of a tilted policy in a world.

    Transitions are deterministic: the next state depends on the counts and on the token taken, not on the token before.

    Args:
        values: (T, S, V, M) float64, Q_m(step, counts, token) = E_π[R_m | the token is taken], normalised.
        kl_to_come: (T, S, V) float64, K = E_π[Σ of later steps' KL | the token is taken], nats.
        rewards: (M,) float64, E_π[R_m] from the start.
        kl: () float64, E_π[Σ_t KL_t] from the start, nats.

    Examples:
        The reference policy has reward 0 on the normalised scale, and KL 0:

        >>> import torch
        >>> from mavis.exact import World, evaluate_tilt
        >>> world = World.random("linear", seed=0, tokens=10, steps=4)
        >>> evaluation = evaluate_tilt(world, torch.zeros(4, len(world.rewards), 1, 10, dtype=torch.float64))
        >>> evaluation.values.shape, bool(evaluation.rewards[0].abs() < 1e-9), bool(evaluation.kl < 1e-9)
        (torch.Size([4, 25, 10, 2]), True, True)
    """

    values: Tensor
    kl_to_come: Tensor
    rewards: Tensor
    kl: Tensor


def evaluate_tilt(world: World, tilt: Tensor) -> TiltEvaluation:
    """Evaluate π ∝ π_ref · exp(tilt) by backward induction.

        Q_t(c, a) = W_{t+1}(c + a, a),   W_t(c, s) = Σ_a π_t(a|c, s) Q_t(c, a),   W_T(c, ·) = R(c)

    and likewise for K, to which every step adds its own KL.

    Args:
        world: the world.
        tilt: (T, S, V, V) float64 by step, counts, last token and token; (T, S, 1, V) if it does not depend on the last
            token.

    Returns:
        The evaluation.

    Examples:
        >>> import torch
        >>> from mavis.exact import World, evaluate_tilt
        >>> world = World.random("linear", seed=0, tokens=10, steps=4)
        >>> towards = world.counted[0].double().expand(4, len(world.rewards), 1, 10)  # what the first objective counts
        >>> evaluation = evaluate_tilt(world, towards)
        >>> bool(evaluation.rewards[0] > 0), bool(evaluation.kl > 0)
        (True, True)
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
    return TiltEvaluation(values[..., :objectives], values[..., objectives], start[:objectives], start[objectives])


def optimal_tilt(world: World, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the tilt of the optimal policy by soft backward induction.

        tilt*_t(c, a) = L_{t+1}(c + a, a),   L_t(c, s) = log Σ_a π_ref(a|s) exp(tilt*_t(c, a)),   L_T(c, ·) = λ·R(c)

    Args:
        world: the world.
        lam: (M,), λ = β·w.

    Returns:
        tilt*: (T, S, 1, V) float64; and β·J* = E[L_0], () float64.

    Source: KL-regularised control (Todorov, PNAS 2009), with deterministic transitions.

    Examples:
        >>> import torch
        >>> from mavis.exact import World, evaluate_tilt, optimal_tilt, regularised_return
        >>> world, lam = World.random("product", seed=0, tokens=10, steps=4), torch.tensor([2.0, 1.0])
        >>> tilt, best = optimal_tilt(world, lam)
        >>> bool(torch.isclose(regularised_return(evaluate_tilt(world, tilt), lam), best))
        True
    """
    following, every_token = world.next_counts, torch.arange(world.tokens)
    ahead = (world.rewards @ lam.double())[:, None].expand(-1, world.tokens)
    tilts = []
    for _ in range(world.steps):
        tilt = ahead[following, every_token]
        tilts.append(tilt[:, None, :])
        ahead = torch.logsumexp(world.logprobs + tilt[:, None, :], dim=-1)
    return torch.stack(tilts[::-1]), ahead[0].mean()


def regularised_return(evaluation: TiltEvaluation, lam: Tensor) -> Tensor:
    """Compute β·J = λ·E[R] − KL.

    Args:
        evaluation: of a tilt.
        lam: (M,), λ = β·w.

    Returns:
        () float64, nats.

    Examples:
        >>> import torch
        >>> from mavis.exact import TiltEvaluation, regularised_return
        >>> values, kl_to_come = torch.zeros(4, 25, 10, 2), torch.zeros(4, 25, 10)
        >>> rewards, kl = torch.tensor([0.5, 1.0]).double(), torch.tensor(0.25).double()
        >>> regularised_return(TiltEvaluation(values, kl_to_come, rewards, kl), torch.tensor([2.0, 1.0])).item()
        1.75
    """
    return evaluation.rewards @ lam.double() - evaluation.kl


def normalised_gain(world: World, tilt: Tensor, lam: Tensor) -> float:
    """Compute the fraction of the possible gain over the reference policy that a tilt achieves.

        gain = (J − J_ref) / (J* − J_ref)

    Args:
        world: the world.
        tilt: see `evaluate_tilt`.
        lam: (M,), λ = β·w, not all zero.

    Returns:
        At most 1; negative if the tilt is worse than none.

    Examples:
        >>> import torch
        >>> from mavis.exact import World, normalised_gain, optimal_tilt
        >>> world, lam = World.random("product", seed=0, tokens=10, steps=4), torch.tensor([2.0, 1.0])
        >>> tilt, _ = optimal_tilt(world, lam)
        >>> round(normalised_gain(world, tilt, lam), 6), round(normalised_gain(world, tilt / 2, lam), 2) < 1.0
        (1.0, True)
    """
    no_tilt = world.rewards.new_zeros(1, 1, 1, 1).expand(world.steps, len(world.rewards), 1, world.tokens)
    reference = regularised_return(evaluate_tilt(world, no_tilt), lam)
    ours = regularised_return(evaluate_tilt(world, tilt), lam)
    return float((ours - reference) / (optimal_tilt(world, lam)[1] - reference))


def policy_iteration(
    world: World, weights: Tensor, beta: float, composition: Literal["independent", "conditioned"]
) -> Iterator[Tensor]:
    """Improve a tilt by iterations of policy evaluation and improvement, with exact values.

        conditioned:  tilt ← Σ_m λ_m Q_m − K of the policy with this tilt
        independent:  tilt_m ← β Q_m − K of the policy with tilt_m, for each objective;  tilt = Σ_m w_m tilt_m

    Args:
        world: the world.
        weights: (M,), w.
        beta: β > 0.
        composition: how the objectives' values are combined.

    Yields:
        (T, S, 1, V) float64 tilts without end; the first is that of the reference policy's values.

    Source: `independent` is MAVIS (arXiv 2508.13415) with ζ = 1/β; `conditioned` is soft policy iteration on the
    weighted reward.

    Examples:
        >>> import torch
        >>> from itertools import islice
        >>> from mavis.exact import World, normalised_gain, policy_iteration
        >>> world, weights = World.random("product", seed=0, tokens=10, steps=4), torch.tensor([0.5, 0.5])
        >>> tilts = islice(policy_iteration(world, weights, 2.0, "conditioned"), 4)
        >>> gains = [normalised_gain(world, tilt, 2.0 * weights) for tilt in tilts]
        >>> gains == sorted(gains), round(gains[-1], 3)
        (True, 1.0)
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
