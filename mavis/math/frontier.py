"""The highest reward that any policy can reach at a given KL to the reference policy, and how close we come.

For one prompt, among all policies with KL(π ‖ π_ref) ≤ κ the best expected reward is that of
π_β(y) ∝ π_ref(y) exp(β r(y)) for the β at which the KL is κ. N rollouts of the reference policy stand for
π_ref, each with probability 1/N, so the limit needs rewards only and no training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mavis.errors import EvaluationError, check_number

# Below this many nats the KL of a tilt is lost in the rounding of log N, and β = 0 is the answer.
_KL_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class OptimalFrontier:
    """The optimal frontier at G tilt strengths; every tensor is float64 and (G,).

    Attributes:
        beta: tilt strength, in 1 / reward units.
        reward: best reachable expected reward at `kl`, mean over prompts.
        kl: KL to the reference policy in nats per response, mean over prompts.
        effective_sample_size: 1 / Σ_i p_i² of the prompt where it is smallest, from 1 to N.

    Examples:
        See `optimal_frontier`, which returns it:

        >>> import torch
        >>> from mavis.math import optimal_frontier
        >>> optimal_frontier(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0])).reward.tolist()
        [0.5]
    """

    beta: Tensor
    reward: Tensor
    kl: Tensor
    effective_sample_size: Tensor


def optimal_frontier(rewards: Tensor, betas: Tensor) -> OptimalFrontier:
    """Compute the reward and KL of the optimal policy at each tilt strength, from reference rollouts alone.

        p_i ∝ exp(β r_i),   reward = mean_prompts Σ_i p_i r_i,   KL = mean_prompts Σ_i p_i log(N p_i)

    One β serves all prompts, and p is normalised within each prompt: normalised over all rollouts, the limit could
    choose easy prompts, which no policy can. Reward and KL grow with β; the effective sample size shrinks.

    Args:
        rewards: (P, N) rewards w·R of N reference rollouts for each of P prompts; finite, any real dtype.
        betas: (G,) tilt strengths ≥ 0, in 1 / reward units (the inverse of the β of DPO and RLHF papers).

    Returns:
        An `OptimalFrontier` of (G,) float64 tensors on the device of `rewards`.

    Raises:
        EvaluationError: if `rewards` is not a finite, non-empty (P, N), or `betas` is not a (G,) of finite
            numbers ≥ 0.

    Source: the Gibbs variational principle (Donsker and Varadhan 1975) on the empirical distribution of the
    rollouts, self-normalised importance weights for p.

    Examples:
        >>> import math, torch
        >>> from mavis.math import optimal_frontier
        >>> frontier = optimal_frontier(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, math.log(3.0)]))  # p = ¼, ¾
        >>> [round(x, 3) for x in frontier.reward.tolist()], [round(x, 3) for x in frontier.kl.tolist()]
        ([0.5, 0.75], [0.0, 0.131])
    """
    rewards = _checked_rewards(rewards)
    if betas.ndim != 1 or not bool(torch.isfinite(betas).all()) or bool((betas < 0).any()):
        raise EvaluationError(
            f"betas must be a (G,) tensor of finite numbers ≥ 0, got shape {tuple(betas.shape)}: {betas.tolist()}.",
            "pass e.g. torch.tensor([0.0, 0.5, 1.0, 2.0]).",
        )
    betas = betas.to(rewards)
    points = [_tilted(rewards, beta) for beta in betas.tolist()]
    columns = rewards.new_tensor(points).reshape(-1, 3).unbind(1)
    return OptimalFrontier(beta=betas, reward=columns[0], kl=columns[1], effective_sample_size=columns[2])


def optimal_reward_at(rewards: Tensor, kl: float, min_effective_sample_size: float = 50.0) -> float:
    """Compute the best reachable reward at one KL.

    It is the `optimal_frontier` at the β whose mean KL is `kl`. Where many rollouts share the highest reward, as with
    rewards that saturate, even β → ∞ may cost less than `kl`; the highest reward is then the limit.

    Args:
        rewards: (P, N) rewards w·R of N reference rollouts for each of P prompts; finite, any real dtype.
        kl: KL to the reference policy in nats per response, mean over prompts, ≥ 0.
        min_effective_sample_size: the smallest 1 / Σ_i p_i² that is accepted for any prompt.

    Returns:
        The reward, mean over prompts, in the units of `rewards`.

    Raises:
        EvaluationError: if `kl` is negative or not finite, or a prompt's effective sample size there is below
            `min_effective_sample_size`, so that a few lucky rollouts would decide the result. Where no β reaches `kl`,
            that is the number of rollouts that share the prompt's highest reward.

    Source: as `optimal_frontier`; β by bisection on log β, as d KL / d β = β Var_p(r) ≥ 0.

    Examples:
        >>> import torch
        >>> from mavis.math import optimal_reward_at
        >>> reward = optimal_reward_at(torch.tensor([[0.0, 1.0]]), kl=0.1308, min_effective_sample_size=1.5)
        >>> round(reward, 3)
        0.75
    """
    rewards = _checked_rewards(rewards)
    check_number(EvaluationError, "pass nats per response.", low=0, kl=kl)
    rollouts = rewards.shape[1]
    best = (rewards == rewards.amax(1, keepdim=True)).sum(1).double()
    ceiling = float((math.log(rollouts) - best.log()).mean())
    if kl > _KL_ROUNDING and kl >= ceiling - _KL_ROUNDING:
        # Every prompt's best reward costs less than the budget. Where enough rollouts share it, the policy can reach it
        # and more KL buys nothing; where few do, it is only the luckiest of N.
        if float(best.min()) >= min_effective_sample_size:
            return float(rewards.amax(1).mean())
        raise EvaluationError(
            f"kl {kl:.4g} cannot be reached: {rollouts} reference rollouts per prompt with these rewards "
            f"reach less than {ceiling:.4g} nats.",
            "draw more reference rollouts or stop at a smaller KL.",
        )
    reward, _, effective = _tilted(rewards, _beta_at(rewards, kl))
    if effective < min_effective_sample_size:
        raise EvaluationError(
            f"the optimal reward at kl {kl:.4g} rests on an effective sample size of {effective:.1f} of "
            f"{rollouts} reference rollouts for one prompt, and {min_effective_sample_size:g} are needed.",
            "draw more reference rollouts or stop at a smaller KL.",
        )
    return reward


def reward_at(kl: Tensor, rewards: Tensor, target: float) -> float | None:
    """Interpolate the reward at a KL from a sweep over β, linearly between neighbouring points.

    Where the sweep is concave, as an optimal one is, the chord lies below it, so interpolation never overstates.

    Args:
        kl: (G,) measured KL to the reference policy in nats per response, in any order; include the reference policy
            itself, at KL 0, if the sweep leads there. Points of equal KL are averaged.
        rewards: (G,) measured rewards w·R of the same points.
        target: the KL to interpolate at.

    Returns:
        The reward, or None if `target` lies outside the measured KLs: nothing is extrapolated.

    Raises:
        EvaluationError: if the shapes differ or are not (G,), or a number is not finite.

    Examples:
        >>> import torch
        >>> from mavis.math import reward_at
        >>> kl, rewards = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.5])
        >>> reward_at(kl, rewards, 1.5), reward_at(kl, rewards, 3.0)
        (1.25, None)
    """
    if kl.ndim != 1 or kl.shape != rewards.shape:
        raise EvaluationError(
            f"kl and rewards must both be (G,), got {tuple(kl.shape)} and {tuple(rewards.shape)}.",
            "pass one KL and one reward for each point of the sweep.",
        )
    if not (bool(torch.isfinite(kl).all()) and bool(torch.isfinite(rewards).all()) and math.isfinite(target)):
        raise EvaluationError("kl, rewards and target must be finite.", "drop the points that could not be measured.")
    points, group = kl.double().unique(return_inverse=True)  # sorted
    if len(points) == 0 or not float(points[0]) <= target <= float(points[-1]):
        return None
    heights = torch.zeros_like(points).index_add_(0, group, rewards.double()) / group.bincount()
    right = int((points < target).sum())
    if float(points[right]) == target:
        return float(heights[right])
    share = (target - points[right - 1]) / (points[right] - points[right - 1])
    return float(torch.lerp(heights[right - 1], heights[right], share))


def frontier_efficiency(ours: float, reference: float, optimal: float) -> float:
    """Compute the fraction of the reachable gain in reward that is reached at one KL.

        efficiency = (ours − reference) / (optimal − reference)

    Args:
        ours: our reward w·R at that KL (`reward_at`).
        reference: reward of the reference policy on the same prompts.
        optimal: best reachable reward at that KL (`optimal_reward_at`).

    Returns:
        1 on the optimal frontier, 0 for no gain, negative for a loss; only noise exceeds 1.

    Raises:
        EvaluationError: if a number is not finite, or `optimal` is not above `reference`.

    Examples:
        >>> from mavis.math import frontier_efficiency
        >>> frontier_efficiency(ours=0.75, reference=0.5, optimal=1.0)
        0.5
    """
    if not all(math.isfinite(number) for number in (ours, reference, optimal)):
        raise EvaluationError(
            f"frontier efficiency needs finite rewards, got ours {ours}, reference {reference} and optimal {optimal}.",
            "check the rewards, and that the sweep over beta spans this KL.",
        )
    if optimal <= reference:
        raise EvaluationError(
            f"frontier efficiency has no scale: the optimal reward {optimal:.4g} is not above the "
            f"reference's {reference:.4g}.",
            "choose a KL above 0, weights above 0, and an objective whose rewards vary.",
        )
    return (ours - reference) / (optimal - reference)


def _checked_rewards(rewards: Tensor) -> Tensor:
    if rewards.ndim != 2 or rewards.numel() == 0 or not bool(torch.isfinite(rewards).all()):
        raise EvaluationError(
            f"rewards must be a finite, non-empty (prompts, rollouts) tensor, got shape {tuple(rewards.shape)}.",
            "weight the objectives first, and draw the same number of reference rollouts for every prompt.",
        )
    return rewards.double()


def _tilted(rewards: Tensor, beta: float) -> tuple[float, float, float]:
    """Mean reward, mean KL and smallest effective sample size of (P, N) rollouts tilted by `beta`."""
    # Relative to each prompt's best, β·r keeps its digits however far the rewards lie from zero.
    logprobs = torch.log_softmax(beta * (rewards - rewards.amax(1, keepdim=True)), dim=1)
    probs = logprobs.exp()
    reward = (probs * rewards).sum(1).mean()
    kl = (probs * (logprobs + math.log(rewards.shape[1]))).sum(1).mean().clamp(min=0.0)
    effective = 1.0 / probs.square().sum(1).amax()
    return float(reward), float(kl), float(effective)


def _beta_at(rewards: Tensor, kl: float) -> float:
    """The β whose mean KL is `kl`, which must lie below the largest KL that the rollouts reach."""
    if kl <= _KL_ROUNDING:
        return 0.0
    # Gaussian rewards would need β = √(2 KL) / std; the bracket grows from there by factors of two.
    low = high = math.sqrt(2.0 * kl) / float(rewards.std(1, correction=0).square().mean().sqrt())
    while _tilted(rewards, low)[1] > kl:
        low /= 2.0
    while _tilted(rewards, high)[1] < kl:
        high *= 2.0
    while high > low * (1.0 + 1e-12):
        middle = math.sqrt(low * high)
        if _tilted(rewards, middle)[1] < kl:
            low = middle
        else:
            high = middle
    return high
